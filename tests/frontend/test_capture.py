"""Captured graphs against transformers' eager attention, in fp32, for every architecture; each check can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.frontend import Captured, capture, load_checkpoint
from llmopt.ir.module import Module
from llmopt.ir.verify import refresh, verify
from tests.architectures import ARCHITECTURES, CONTEXT, VOCAB, WINDOW, make_checkpoint
from tests.frontend.running import captured_logits, eager_model, relative_error

TOLERANCE = 1e-5
LENGTHS = (1, 2, WINDOW + 1, 40)
KNOWN_ATEN = {
    "add", "sub", "mul", "div", "neg", "tanh", "silu", "gelu", "relu", "sigmoid", "softmax", "topk", "sum", "embedding",
    "linear", "layer_norm", "view", "reshape", "transpose", "split", "split_with_sizes", "slice", "cat", "unsqueeze",
    "squeeze", "to", "sym_size", "chunk", "select",
}  # fmt: skip


def tokens(length: int) -> torch.Tensor:
    """Reproducible token ids (1, length)."""
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))


# Each is captured once, by one worker.
EVERY_ARCHITECTURE = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"capture of {name}")) for name in sorted(ARCHITECTURES)
]


@pytest.fixture(scope="module", params=EVERY_ARCHITECTURE)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Captured]:
    """transformers' model of an architecture and its capture."""
    path = make_checkpoint(request.param, tmp_path_factory.mktemp(request.param.replace("/", "-")))
    return eager_model(path), capture(load_checkpoint(path))


def test_logits_equal_eager(case: tuple[Any, Captured]) -> None:
    model, captured = case
    for length in LENGTHS:
        ids = tokens(length)
        with torch.no_grad():
            expected = model(ids).logits
        assert relative_error(captured_logits(captured.module, ids), expected) <= TOLERANCE, length


def test_positions_are_the_inputs(case: tuple[Any, Captured]) -> None:
    model, captured = case
    if captured.module.config.max_context < 60:
        pytest.skip("too short a context")
    ids, positions = tokens(12), torch.arange(9, 21)[None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
    assert relative_error(captured_logits(captured.module, ids, positions), expected) <= TOLERANCE


def test_vocabulary(case: tuple[Any, Captured]) -> None:
    """Only llmopt ops and known aten; attention in every layer; one symbol; every value and scope present."""
    model, captured = case
    module = captured.module
    graph = module.functions["step"].graph
    assert [n.name for n in graph.find_nodes(op="placeholder")] == ["input_ids", "position_ids"]
    assert list(module.symbols.values()) == ["T"]
    assert module.dims == {"T": (1, module.config.max_context)}
    layers = model.config.num_hidden_layers
    assert len(graph.find_nodes(op="call_function", target=torch.ops.llmopt.attention.default)) == layers
    for node in graph.find_nodes(op="get_attr"):
        assert module.weights[str(node.target)].shape == tuple(node.meta["val"].shape)
        assert module.weights[str(node.target)].dtype == node.meta["val"].dtype
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace == "llmopt" or node.target._opname in KNOWN_ATEN, node.format_node()
            assert node.meta["val"] is not None
    names = [str(node.target) for node in graph.find_nodes(op="get_attr")]
    assert len(names) == len(set(names))
    shape = graph.output_node().args[0][0].meta["val"].shape
    assert (shape[0], shape[2]) == (1, VOCAB)


def test_ledger(case: tuple[Any, Captured]) -> None:
    _, captured = case
    ledger = captured.ledger.to_json()
    for what in ("flops", "bytes"):
        assert ledger[what]["compiled"] + ledger[what]["generic"] == pytest.approx(1.0)
        assert ledger[what]["eager"] == 0
    assert ledger["flops"]["compiled"] > 0.9
    assert sum(gap["nodes"] for gap in ledger["gaps"]) == ledger["nodes"]["generic"]
    assert all(gap["op"] for gap in ledger["gaps"])


def edit(module: Module, target: Any, index: int, value: Callable[[Any], Any]) -> int:
    """Change one argument of every call of an op; the number of calls changed."""
    changed = 0
    for node in module.functions["step"].graph.find_nodes(op="call_function", target=target):
        arguments: list[Any] = list(node.args)
        if arguments[index] != value(arguments[index]):
            arguments[index] = value(arguments[index])
            node.args, changed = tuple(arguments), changed + 1
    module.functions["step"].recompile()
    return changed


ATTENTION = torch.ops.llmopt.attention.default
DAMAGE = {
    "window": ("mistral", ATTENTION, 5, lambda w: w and w + 1),
    "no window": ("gemma3", ATTENTION, 5, lambda w: 0),
    "softcap": ("gemma2", ATTENTION, 6, lambda c: 0.0),
    "sinks": ("gpt_oss", ATTENTION, 3, lambda s: None),
    "scale": ("granite", ATTENTION, 4, lambda s: s * 1.01),
    "pairing": ("cohere2", torch.ops.llmopt.rope.default, 3, lambda i: not i),
    "norm offset": ("gemma2", torch.ops.llmopt.rms_norm.default, 3, lambda o: 0.0),
    "eps": ("llama", torch.ops.llmopt.rms_norm.default, 2, lambda e: 1e-2),
    "rope factor": ("llama-yarn", torch.ops.llmopt.rotary_table.default, 2, lambda s: 1.0),
    "longrope switch": ("phi3-longrope", torch.ops.llmopt.rotary_table.default, 5, lambda s: s + 40),
    "activation": ("mixtral", torch.ops.llmopt.moe_experts.default, 7, lambda a: "gelu"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damage_is_seen(damage: str, tmp_path: Path) -> None:
    """Negative control: each kind of damage fails the comparison that the sound graph passes."""
    name, target, index, value = DAMAGE[damage]
    path = make_checkpoint(name, tmp_path)
    module = capture(load_checkpoint(path)).module
    ids = tokens(40)
    with torch.no_grad():
        expected = eager_model(path)(ids).logits
    assert relative_error(captured_logits(module, ids), expected) <= TOLERANCE
    assert edit(module, target, index, value) > 0
    assert relative_error(captured_logits(module, ids), expected) > 10 * TOLERANCE


def test_shifted_position_is_seen(tmp_path: Path) -> None:
    path = make_checkpoint("gpt2", tmp_path)
    module = capture(load_checkpoint(path)).module
    ids = tokens(20)
    with torch.no_grad():
        expected = eager_model(path)(ids).logits
    assert relative_error(captured_logits(module, ids, torch.arange(1, 21)[None]), expected) > 1e-3


def test_longrope_switches_with_the_length(tmp_path: Path) -> None:
    path = make_checkpoint("phi3-longrope", tmp_path)
    captured = capture(load_checkpoint(path))
    model = eager_model(path)
    assert captured.module.rope_switch == 24
    for length in (23, 24, 25, 26):
        with torch.no_grad():
            expected = model(tokens(length)).logits
        assert relative_error(captured_logits(captured.module, tokens(length)), expected) <= TOLERANCE
    short = capture(load_checkpoint(path), max_context=24)
    assert short.module.rope_switch is None


def test_dynamic_scaling_beyond_the_trained_context(tmp_path: Path) -> None:
    """A context beyond the trained one takes transformers' frequencies at that length."""
    path = make_checkpoint("llama-dynamic", tmp_path)
    module = capture(load_checkpoint(path), max_context=CONTEXT).module
    with torch.no_grad():
        expected = eager_model(path)(tokens(CONTEXT)).logits
    assert relative_error(captured_logits(module, tokens(CONTEXT)), expected) <= TOLERANCE


def test_tied_weights_share_one_node(tmp_path: Path) -> None:
    module = capture(load_checkpoint(make_checkpoint("llama-tied", tmp_path))).module
    assert "lm_head.weight" not in module.weights
    (node,) = module.functions["step"].graph.find_nodes(op="get_attr", target="model.embed_tokens.weight")
    assert {user.target for user in node.users} == {torch.ops.aten.embedding.default, torch.ops.aten.linear.default}


@pytest.mark.parametrize("kind", ["equal copy", "different copy", "only the head"])
def test_tied_weights_as_stored(kind: str, tmp_path: Path) -> None:
    """A config may tie what the file holds twice, differently, or under the other name."""
    path = make_checkpoint("llama-tied", tmp_path)
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if kind != "different copy" else embedding.flip(0).contiguous()
    if kind == "only the head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    module = capture(load_checkpoint(path)).module
    with torch.no_grad():
        expected = eager_model(path)(tokens(9)).logits
    assert relative_error(captured_logits(module, tokens(9)), expected) <= TOLERANCE
    names = {"model.embed_tokens.weight", "lm_head.weight"} & set(module.weights)
    assert len(names) == (2 if kind == "different copy" else 1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "mixtral"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """bf16 graphs compute in bf16 and stay as near to fp32 as transformers' own bf16 does."""
    path = make_checkpoint(name, tmp_path, torch.bfloat16)
    captured = capture(load_checkpoint(path))
    floats = {w.dtype for n, w in captured.module.weights.items() if not n.endswith("inv_freq")}
    assert floats == {torch.bfloat16}
    ids = tokens(30)
    with torch.no_grad():
        truth = eager_model(path)(ids).logits
        theirs = eager_model(path, torch.bfloat16)(ids).logits
    ours = captured_logits(captured.module, ids)
    assert ours.dtype == torch.bfloat16
    error, reference = ((x.double() - truth.double()).pow(2).mean().sqrt() for x in (ours, theirs))
    assert error <= 1.25 * reference


def test_dtype_override_casts(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path, torch.bfloat16)
    module = capture(load_checkpoint(path), dtype=torch.float32).module
    with torch.no_grad():
        expected = eager_model(path)(tokens(9)).logits
    assert relative_error(captured_logits(module, tokens(9)), expected) <= TOLERANCE


def test_same_checkpoint_gives_the_same_graph(tmp_path: Path) -> None:
    path = make_checkpoint("gemma2", tmp_path)
    texts = [str(capture(load_checkpoint(path)).module.functions["step"].graph) for _ in range(2)]
    assert texts[0] == texts[1]


def test_refresh_and_verify(case: tuple[Any, Captured]) -> None:
    """Recomputing every value keeps the graph well formed and symbolic."""
    _, captured = case
    refresh(captured.module)
    verify(captured.module)
