"""quantize_weights: which layers, the names it speaks, and numerics equal to quantizing by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.errors import ConfigError, PassError
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import PassContext, PassManager
from llmopt.ir.quant import RoundToNearest, Scheme
from llmopt.ir.sites import restored
from llmopt.ir.weights import Constant
from llmopt.recipe import build_pass
from llmopt.registry import load_target
from llmopt.report.proof import prove
from llmopt.target import TargetInfo
from tests.ir.handmade import Builder, aten, dialect, llama
from tests.passes.running import FUSIONS, checked, logits, ops, rewrites, run, text

Options = dict[str, Any]


def two_layers(vocab: int = 17) -> Module:
    """Embedding of 32 features, two linears, a head; nothing else."""
    b = Builder(vocab=vocab)
    x = b.linear(b.linear(b.embed(32), "model.a", 64), "b", 32, bias=True)
    return b.finish(b.linear(x, "lm_head", vocab))


def by_hand(module: Module, names: list[str], **options: Any) -> Module:
    """The module with the weights rounded, nothing rewritten."""
    changed = copy.copy(module)
    changed.weights = dict(module.weights)
    for name in names:
        weight = module.weights[name]
        group = options.get("group") or weight.shape[-1]
        scheme = Scheme("int", options["bits"], 1, group, options.get("symmetric", True))
        changed.weights[name] = Constant(RoundToNearest(name, weight, scheme).tensor().dequantize())
    return changed


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (3, 32)])
def test_fires_and_equals_rounding_by_hand(bits: int, group: int | None, symmetric: bool) -> None:
    module = two_layers()
    exact = logits(module)
    expected = logits(by_hand(module, ["model.a.weight", "b.weight"], bits=bits, group=group, symmetric=symmetric))
    options: Options = {"bits": bits, "group_size": group, "symmetric": symmetric}
    assert rewrites(module, ("quantize_weights", options)) == 2
    torch.testing.assert_close(logits(module), expected, rtol=1e-5, atol=1e-5)
    assert float((logits(module) - exact).abs().max()) > 1e-3
    assert ("model.a.weight.zeros" in module.weights) != symmetric
    assert "model.a.weight" not in module.weights
    assert "lm_head.weight" in module.weights


def test_nothing_to_quantize_is_an_error() -> None:
    b = Builder()
    module = b.finish(b.linear(b.embed(32), "lm_head", 17))
    with pytest.raises(PassError, match="no layer is left to quantize"):
        run(module, "quantize_weights")


def test_golden_text() -> None:
    module = two_layers()
    run(module, ("quantize_weights", {"bits": 4, "group_size": 32, "symmetric": False, "include": ["b"]}))
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
) {
  #
  %embedding_0 : f32[1, T, 32] = aten.embedding(@embed.weight, %input_ids)
  %linear_0 : f32[1, T, 64] = aten.linear(%embedding_0, @model.a.weight)
  %linear_q_0 : f32[1, T, 32] = llmopt.linear_q(%linear_0, @b.weight.codes, @b.weight.scales, @b.weight.zeros, @b.bias, None, int, 4, 1, 32)
  %linear_1 : f32[1, T, 17] = aten.linear(%linear_q_0, @lm_head.weight)
  return (%linear_1)
}
""",  # noqa: E501
    )


def test_every_layer_of_a_fused_model_but_the_head() -> None:
    module = llama(2)
    assert rewrites(module, *FUSIONS, "quantize_weights") == 8
    assert ops(module).count("llmopt.linear_q") == 8
    assert ops(module)[-1] == "aten.linear"
    assert any("qkv_proj.weight.codes" in name for name in module.weights)


def test_the_head_by_itself_afterwards() -> None:
    module = two_layers()
    passes = [("quantize_weights", {"bits": 4, "group_size": 32}), ("quantize_weights", {"bits": 8, "lm_head": True})]
    assert [record.rewrites for record in run(module, *passes)] == [2, 1]
    assert "aten.linear" not in ops(module)


def test_a_tied_head_keeps_the_embedding() -> None:
    b = Builder()
    x = b.linear(b.embed(32), "model.a", 32)
    table = b.weight("embed.weight", 17, 32)
    module = b.finish(b.call(aten.linear.default, x, table))
    expected = logits(module)
    assert rewrites(module, ("quantize_weights", {"lm_head": True, "include": ["embed"]})) == 1
    assert {"embed.weight", "embed.weight.codes"} <= set(module.weights)
    assert 0 < float((logits(module) - expected).norm() / expected.norm()) < 0.02


def test_patterns_speak_the_checkpoints_names() -> None:
    names = lambda m: sorted(n for n in m.weights if n.endswith(".codes"))  # noqa: E731
    module = checkpointed_llama()
    run(module, *FUSIONS, ("quantize_weights", {"include": ["*.q_proj", "*.k_proj", "*.v_proj.weight"]}))
    assert names(module) == [f"layers.{i}.attn.qkv_proj.weight.codes" for i in range(2)]
    module = checkpointed_llama()
    run(module, *FUSIONS, ("quantize_weights", {"exclude": ["layers.0.*"]}))
    assert all(name.startswith("layers.1.") for name in names(module))


def checkpointed_llama() -> Module:
    """llama(2) whose weights say which tensor they are, as those of a checkpoint do."""
    from tests.quant.test_quant import Named

    module = llama(2)
    for name, weight in module.weights.items():
        module.weights[name] = Named(weight.tensor(), name)
    return module


def test_a_fused_weight_is_not_split() -> None:
    with pytest.raises(PassError, match=r"k_proj.* are fused .*name all or none"):
        run(checkpointed_llama(), *FUSIONS, ("quantize_weights", {"exclude": ["layers.1.attn.k_proj"]}))
    run(checkpointed_llama(), ("quantize_weights", {"exclude": ["layers.1.attn.k_proj"]}))  # unfused it may be


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(key: str) -> None:
    with pytest.raises(PassError, match=r"'\*\.down_porj' matches no layer \(did you mean '.*down_proj\.weight'\?\)"):
        run(checkpointed_llama(), ("quantize_weights", {key: ["*.down_porj"]}))


def test_a_group_that_does_not_divide_names_the_layer() -> None:
    b = Builder()
    x = b.linear(b.embed(32), "model.a", 48)
    module = b.finish(b.linear(b.linear(x, "model.odd", 32), "lm_head", 17))
    with pytest.raises(PassError, match=r"layer model\.odd\.weight: group_size 32 does not divide its 48"):
        run(module, ("quantize_weights", {"bits": 4, "group_size": 32}))


@pytest.mark.parametrize("options", [{"group_size": 48}, {"bits": "four"}, {"groups": 32}])
def test_options_are_checked(options: Options) -> None:
    with pytest.raises(ConfigError):
        build_pass("quantize_weights", options)


def test_the_target_must_support_it() -> None:
    info = TargetInfo("small", dtypes=("float32",), quant_bits=(8,))
    manager, ctx = PassManager(), PassContext(info, torch.float32)
    with pytest.raises(PassError, match=r"target small has no 4-bit weights \(it has: 8\)"):
        manager.run(two_layers(), [build_pass("quantize_weights", {"bits": 4})], ctx)
    with pytest.raises(PassError, match="target small has no quantized experts"):
        manager.run(two_layers(), [build_pass("quantize_weights", {"experts": True})], ctx)


def test_the_checker_reports_instead_of_failing() -> None:
    checked(llama(2), *FUSIONS, ("quantize_weights", {"bits": 8}))


def mixture(seed: int = 0) -> Module:
    """Experts of 32 features with a routing by linear."""
    b = Builder()
    x = b.embed(32)
    rows = b.call(aten.view.default, x, [b.call(aten.sym_size.int, x, 1), 32])
    b.scope = "layers.0.mlp"
    scores = b.call(aten.softmax.int, b.linear(rows, "layers.0.mlp.gate", 4), -1)
    weight, index = b.split(aten.topk.default, scores, 2)
    gate_up, down = b.weight("layers.0.mlp.gate_up", 4, 64, 32), b.weight("layers.0.mlp.down", 4, 32, 32)
    out = b.call(dialect.moe_experts.default, rows, index, weight, gate_up, down, None, None, "silu")
    return b.finish(b.linear(b.call(aten.unsqueeze.default, out, 0), "lm_head", 17))


@pytest.mark.parametrize("symmetric", [True, False])
def test_experts(symmetric: bool) -> None:
    module, names = mixture(), ["layers.0.mlp.gate_up", "layers.0.mlp.down"]
    expected = logits(by_hand(module, names, bits=4, group=32, symmetric=symmetric))
    options: Options = {"bits": 4, "group_size": 32, "symmetric": symmetric, "experts": True}
    assert rewrites(module, ("quantize_weights", options | {"include": names})) == 1
    torch.testing.assert_close(logits(module), expected, rtol=1e-5, atol=1e-5)
    assert "llmopt.moe_experts_q" in ops(module)


def test_experts_and_routers_are_left_alone_unless_asked() -> None:
    module = mixture()
    with pytest.raises(PassError, match="no layer is left to quantize"):
        run(module, "quantize_weights")
    assert rewrites(module, ("quantize_weights", {"routers": True})) == 1
    assert {"llmopt.moe_experts", "llmopt.linear_q"} <= set(ops(module))


def test_half_of_an_expert_is_refused() -> None:
    with pytest.raises(PassError, match="one call reads both"):
        run(mixture(), ("quantize_weights", {"experts": True, "include": ["*.down"]}))


# The perplexity they are compared with is computed once, by one worker.
COST = pytest.mark.xdist_group("cost of rounding")


@pytest.mark.slow
@COST
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "loss"),
    [(8, None, True, -0.01), (4, 32, True, 0.66), (4, 32, False, 0.97), (4, 128, True, 1.22), (4, 128, False, 1.44)],
)
def test_the_cost_on_a_trained_model(shared: Path, bits: int, group: int | None, symmetric: bool, loss: float) -> None:
    """classics-14m, 32 windows of 512 tokens: the rise of perplexity. Those of 8 bits and of zero points are what a
    simulation before the code measured; symmetric int4 clips its top by a step, see below."""

    def rounded(name: str, layer: torch.nn.Linear) -> torch.Tensor:
        scheme = Scheme("int", bits, 1, group or layer.in_features, symmetric)
        return RoundToNearest(name, Constant(layer.weight.data), scheme).tensor().dequantize()

    assert cost(shared, rounded) == pytest.approx(loss, abs=0.03)


@pytest.mark.slow
@COST
@pytest.mark.parametrize(("group", "loss"), [(32, 1.35), (128, 1.91)])
def test_unclipped_symmetric_codes_cost_what_the_simulation_measured(shared: Path, group: int, loss: float) -> None:
    """Scales of max / 7, by hand: twice the cost of ours at group 32, half as much again at 128."""

    def rounded(name: str, layer: torch.nn.Linear) -> torch.Tensor:
        groups = layer.weight.data.unflatten(1, (-1, group))
        scales = groups.abs().amax(-1, keepdim=True) / 7
        return ((groups / scales).round().clamp(-8, 7) * scales).flatten(1)

    assert cost(shared, rounded) == pytest.approx(loss, abs=0.03)


def cost(shared: Path, rounded: Callable[[str, torch.nn.Linear], torch.Tensor]) -> float:
    """Percent by which perplexity rises when every linear but the head has its weight rounded."""
    from transformers import AutoModelForCausalLM

    base, ids = perplexity_setup(shared)
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "classics-14m", dtype=torch.float32).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.weight.data = rounded(name, layer)
    return 100 * (perplexity(model, ids) / base - 1)


def perplexity_setup(shared: Path, known: dict[Path, Any] = {}) -> tuple[float, torch.Tensor]:  # noqa: B006 (a cache)
    """fp32 perplexity of classics-14m and the ids it is measured on."""
    if shared not in known:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = shared / "models" / "classics-14m"
        words = (shared / "data" / "classics-heldout.txt").read_text()[:200_000]
        ids = torch.tensor(AutoTokenizer.from_pretrained(path)(words)["input_ids"][: 32 * 512]).view(32, 512)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        known[shared] = (perplexity(model, ids), ids)
    found: tuple[float, torch.Tensor] = known[shared]
    return found


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Over windows (n, 512), each scored alone."""
    total = 0.0
    for window in ids.split(8):
        scores = model(window).logits[:, :-1].float().flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(scores, window[:, 1:].flatten(), reduction="sum"))
    return float(torch.tensor(total / ids[:, 1:].numel()).exp())


@pytest.mark.parametrize(
    ("scales", "rows", "columns"), [("channel", 1, 256), ("tensor", 128, 256), ("blocks", 128, 128)]
)
def test_fp8_equals_rounding_by_hand(scales: str, rows: int, columns: int) -> None:
    def module() -> Module:
        b = Builder()
        return b.finish(b.linear(b.linear(b.embed(256), "a", 128), "lm_head", 17))

    expected = module()
    scheme = Scheme("fp8_e4m3", 8, rows, columns)
    weight = expected.weights["a.weight"]
    expected.weights["a.weight"] = Constant(RoundToNearest("a", weight, scheme).tensor().dequantize())
    made = module()
    assert rewrites(made, ("quantize_weights", {"format": "fp8_e4m3", "scales": scales})) == 1
    torch.testing.assert_close(logits(made), logits(expected), rtol=1e-5, atol=1e-5)
    assert made.weights["a.weight.codes"].dtype == torch.float8_e4m3fn
    assert made.weights["a.weight.scales"].shape == (128 // rows, 256 // columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp8_e4m3", "bits": 4}, "fp8_e4m3 takes 8 bits, symmetric, and no group_size"),
        ({"format": "fp8_e4m3", "group_size": 32}, "fp8_e4m3 takes 8 bits"),
        ({"scales": "tensor"}, "scales of integers are set by group_size"),
    ],
)
def test_options_that_do_not_go_together(options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pass("quantize_weights", options)


def test_a_target_without_fp8_is_refused() -> None:
    ctx = PassContext(TargetInfo("t", quant_bits=(8,)), torch.float32)
    with pytest.raises(PassError, match="target t has no fp8_e4m3 weights"):
        PassManager().run(two_layers(), [build_pass("quantize_weights", {"format": "fp8_e4m3"})], ctx)


def test_fp8_blocks_must_divide() -> None:
    with pytest.raises(PassError, match="group_size 128 does not divide its 32 input features"):
        run(two_layers(), ("quantize_weights", {"format": "fp8_e4m3", "scales": "blocks"}))


def tied(vocab: int = 17) -> Module:
    """A table that both embeds and makes the logits."""
    b = Builder(vocab=vocab)
    x = b.linear(b.embed(32), "model.a", 32)
    return b.finish(b.call(aten.linear.default, x, b.weight("embed.weight", vocab, 32)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_embeddings_equal_rounding_by_hand(bits: int, group: int | None, symmetric: bool) -> None:
    module = two_layers()
    expected = logits(by_hand(module, ["embed.weight"], bits=bits, group=group, symmetric=symmetric))
    options: Options = {"bits": bits, "group_size": group, "symmetric": symmetric, "embeddings": True}
    assert rewrites(module, ("quantize_weights", options | {"include": ["embed"]})) == 1
    torch.testing.assert_close(logits(module), expected, rtol=1e-5, atol=1e-5)
    assert "llmopt.embedding_q" in ops(module)
    assert "embed.weight" not in module.weights


def test_a_tied_table_is_quantized_once_or_twice() -> None:
    once, twice = tied(), tied()
    only: Options = {"include": ["embed"]}
    run(once, ("quantize_weights", {**only, "embeddings": True, "lm_head": True}))
    assert [n for n in once.weights if n.startswith("embed") and n.endswith("codes")] == ["embed.weight.codes"]
    expected = by_hand(tied(), ["embed.weight"], bits=8)
    torch.testing.assert_close(logits(once), logits(expected), rtol=1e-5, atol=1e-5)
    run(
        twice,
        ("quantize_weights", {**only, "embeddings": True, "bits": 8}),
        ("quantize_weights", {**only, "lm_head": True, "bits": 4, "group_size": 32}),
    )
    assert {"embed.weight.codes", "embed.weight+.codes"} <= set(twice.weights)
    assert (
        int(twice.weights["embed.weight+.codes"].tensor().max())
        < 16
        <= int(twice.weights["embed.weight.codes"].tensor().max())
    )


def test_embeddings_are_refused_where_the_target_has_none() -> None:
    for name in ("reference", "onnxruntime", "cuda"):
        assert load_target(name).info.quant_embeddings
    ctx = PassContext(TargetInfo("small", quant_bits=(8,)), torch.float32)
    with pytest.raises(PassError, match="target small has no quantized embeddings"):
        PassManager().run(two_layers(), [build_pass("quantize_weights", {"embeddings": True})], ctx)


def test_the_proof_covers_embeddings() -> None:
    module = two_layers()
    run(module, ("quantize_weights", {"bits": 4, "group_size": 32, "embeddings": True}))
    tokens = torch.randint(17, (2, 25), generator=torch.Generator().manual_seed(0))
    result = prove(two_layers(), module, tokens, lambda *_: None)
    assert [layer["name"] for layer in result["layers"]] == ["embed.weight", "model.a.weight", "b.weight"]
    assert all(1e-4 < layer["output_error"] < 0.1 for layer in result["layers"])
    torch.testing.assert_close(logits(restored(module, keep=())), logits(two_layers()))
