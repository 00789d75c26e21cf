"""Calibrated quantization of experts: each is fitted to its own rows, those with few or none by a rule that is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.calibration.experts import Experts, joined
from llmopt.calibration.moments import measure
from llmopt.calibration.session import Group
from llmopt.errors import PassError
from llmopt.ir.feed import run_sequence
from llmopt.ir.module import Module
from llmopt.ir.ops.moe import gate
from llmopt.ir.rewrite import arguments, dialect
from llmopt.ir.sites import restored
from llmopt.ir.weights import Constant, Weight
from llmopt.report.proof import prove, sensitivity
from tests.calibration.running import calibrated, mixture, windows
from tests.passes.running import logits, ops, run

G32: dict[str, Any] = {"bits": 4, "group_size": 32, "experts": True}
LAYOUTS = ("silu", "swiglu_oai")
EXPERTS, EXPERTS_Q = dialect.moe_experts.default, dialect.moe_experts_q.default
GATE_UP, DOWN = "experts.gate_up", "experts.down"


def routed(module: Module, tokens: Tensor) -> tuple[list[Any], Tensor, Tensor]:
    """The experts' call, its inputs (n, C) and choices (n, 2) on some windows."""
    (node,) = (n for n in module.functions["step"].graph.nodes if n.target in (EXPERTS, EXPERTS_Q))
    found: list[tuple[Tensor, Tensor]] = []
    for window in tokens:
        seen: dict[Any, Any] = {}
        run_sequence(module, "step", window.tolist(), observe=seen.__setitem__)
        x, index = arguments(node)[:2]
        found.append((seen[x], seen[index]))
    xs, choices = zip(*found)
    return arguments(node), torch.cat(xs), torch.cat(choices)


def values(module: Module, name: str) -> Tensor:
    """A weight's values, also when they are quantized to 4 bits in groups of 32."""
    if name in module.weights:
        return module.weights[name].tensor()
    codes, scales = (module.weights[f"{name}.{kind}"].tensor() for kind in ("codes", "scales"))
    return ((codes.float() - 8).unflatten(-1, (-1, 32)) * scales[..., None]).flatten(-2)


def errors(module: Module, exact: Module, tokens: Tensor, everyone: bool = False) -> Tensor:
    """Squared error of each expert's result on the rows it is chosen for, or on all, (E,), both matrices quantized."""
    given, x, index = routed(exact, tokens)
    biases = [None if b is None else exact.weights[str(b.target)].tensor() for b in given[5:7]]

    def result(source: Module, e: int, rows: Tensor) -> Tensor:
        first, second = values(source, GATE_UP)[e], values(source, DOWN)[e]
        hidden = torch.nn.functional.linear(rows, first, None if biases[0] is None else biases[0][e])
        return gate(hidden, given[7]) @ second.T

    found = []
    for e in range(len(values(exact, GATE_UP))):
        rows = x if everyone else x[(index == e).any(-1)]
        found.append((result(module, e, rows) - result(exact, e, rows)).pow(2).sum())
    return torch.stack(found)


def tokens(count: int = 40, seed: int = 0) -> Tensor:
    return windows(count, 48, vocab=61, seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_expert_errs_less_than_rounded(layout: str, tmp_path: Path) -> None:
    plain, made = mixture(layout), mixture(layout)
    run(plain, ("quantize_weights", G32))
    assert calibrated(made, tmp_path, ("gptq", G32), tokens=tokens())[-1].rewrites == 1
    assert "llmopt.moe_experts_q" in ops(made)
    (note,) = made.notes["gptq"]["experts"]
    assert note["layer"] == GATE_UP
    assert sum(note["rows"]) == 2 * tokens().numel()
    assert note["rules"] == {}
    found, rounded = (errors(m, mixture(layout), tokens(8, seed=5)) for m in (made, plain))
    assert bool((found < 0.8 * rounded).all())


def test_rows_of_mixed_up_channels_teach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: each channel keeps its sizes, what they have in common is gone."""

    true = Group.rows

    def shuffled(self: Group) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for rows in true(self):
            yield torch.stack([c[torch.randperm(len(c), generator=generator)] for c in rows.T], 1)

    plain, made = mixture(), mixture()
    run(plain, ("quantize_weights", G32))
    monkeypatch.setattr(Group, "rows", shuffled)
    calibrated(made, tmp_path, ("gptq", G32), tokens=tokens())
    found, rounded = (errors(m, mixture(), tokens(8, seed=5)) for m in (made, plain))
    assert float(found.sum()) > 0.95 * float(rounded.sum())


def without(expert: int, layout: str) -> Module:
    """A mixture that never chooses one of its experts."""
    module = mixture(layout)
    bias = module.weights["router.bias"].tensor().clone()
    bias[expert] = -1e4
    module.weights["router.bias"] = Constant(bias)
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_without_rows_is_fitted_to_all_tokens(layout: str, tmp_path: Path) -> None:
    plain, made = without(2, layout), without(2, layout)
    run(plain, ("quantize_weights", G32))
    calibrated(made, tmp_path, ("gptq", G32), tokens=tokens())
    (note,) = made.notes["gptq"]["experts"]
    assert note["rows"][2] == 0
    assert note["rules"] == {"2": "all tokens"}
    found, rounded = (errors(m, mixture(layout), tokens(8, seed=5), everyone=True) for m in (made, plain))
    assert found[2] < 0.8 * rounded[2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_rows_are_told(layout: str, tmp_path: Path) -> None:
    made, few = mixture(layout), tokens(5)
    calibrated(made, tmp_path, ("gptq", G32), tokens=few)
    index = routed(mixture(layout), few)[2]
    counts = [int((index == e).sum()) for e in range(4)]
    (note,) = made.notes["gptq"]["experts"]
    assert note["rows"] == counts
    assert note["rules"] == {str(e): "mostly all tokens" for e, n in enumerate(counts) if n < 96}
    assert note["rules"]


def test_rows_join_the_average_token() -> None:
    own, everyone = (measure([torch.randn(n, 8)], 8) for n in (3, 50))
    found = joined(own, everyone)
    torch.testing.assert_close(found.gram, own.gram + 8 * everyone.gram / 50)
    assert found.rows == 11
    assert torch.equal(joined(own, measure([torch.randn(15, 8)], 8)).gram, torch.eye(8))


def test_too_few_tokens_in_all_are_rounding(tmp_path: Path) -> None:
    plain, made = mixture(), mixture()
    run(plain, ("quantize_weights", G32))
    calibrated(made, tmp_path, ("gptq", G32), tokens=tokens(1))
    assert set(made.notes["gptq"]["experts"][0]["rules"].values()) == {"rounded to nearest"}
    for name in (GATE_UP, DOWN):
        assert torch.equal(values(made, name), values(plain, name))


@dataclass(frozen=True)
class Counted(Weight):
    """A weight that keeps the most rows read at once."""

    value: Weight
    name: str
    most: Counter[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.value.shape)
        object.__setattr__(self, "dtype", self.value.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        self.most[self.name] = max(self.most[self.name], stop - start)
        return self.value.read(start, stop)


@pytest.mark.parametrize("passes", [["gptq"], ["awq"]])
def test_one_expert_is_read_at_a_time(passes: list[str], tmp_path: Path) -> None:
    module, most = mixture(), Counter[str]()
    for name in (GATE_UP, DOWN):
        module.weights[name] = Counted(module.weights[name], name, most)
    calibrated(module, tmp_path, *((name, G32) for name in passes), tokens=tokens(4))
    assert set(most.items()) == {(GATE_UP, 1), (DOWN, 1)}


def test_an_interrupted_build_is_finished_with_the_same_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    asked: list[int] = []
    inputs = Experts.inputs

    def stops(self: Experts, expert: int) -> Any:
        if expert == 2 and 2 not in asked:
            asked.append(2)
            raise Stop
        asked.append(expert)
        return inputs(self, expert)

    monkeypatch.setattr(Experts, "inputs", stops)
    with pytest.raises(Stop):
        calibrated(mixture(), tmp_path / "a", ("gptq", G32), tokens=tokens(6))
    resumed, whole = mixture(), mixture()
    calibrated(resumed, tmp_path / "a", ("gptq", G32), tokens=tokens(6))
    assert asked == [0, 1, 2, 2, 3]
    calibrated(whole, tmp_path / "b", ("gptq", G32), tokens=tokens(6))
    assert resumed.notes == whole.notes
    for name, weight in whole.weights.items():
        assert torch.equal(weight.tensor(), resumed.weights[name].tensor())


def test_activation_order_without_static_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"layer experts\.gate_up: experts have no g_idx"):
        calibrated(mixture(), tmp_path, ("gptq", {**G32, "static_groups": False}))


def test_the_router_is_left_alone_unless_asked(tmp_path: Path) -> None:
    assert calibrated(mixture(), tmp_path, ("gptq", {**G32, "routers": True}))[-1].rewrites == 2
    assert run(mixture(), ("quantize_weights", G32))[-1].rewrites == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_scales_change_no_logit(layout: str, name: str, tmp_path: Path) -> None:
    module = mixture(layout)
    exact, before = logits(module), {n: w.tensor() for n, w in module.weights.items()}
    options = {"experts": True} | ({"clip": False, "group_size": 32} if name == "awq" else {})
    assert calibrated(module, tmp_path, (name, options), tokens=tokens(4))[-1].rewrites == 1
    torch.testing.assert_close(logits(module), exact, rtol=1e-4, atol=1e-5)
    changed = {n for n, value in before.items() if not torch.equal(value, module.weights[n].tensor())}
    inside = {DOWN} if (layout, name) == ("silu", "awq") else set()
    assert changed == {"norm.weight", "router.weight", GATE_UP} | inside


@pytest.mark.parametrize("layout", LAYOUTS)
def test_awq_errs_less_than_rounding(layout: str, tmp_path: Path) -> None:
    def loss(*passes: str | tuple[str, dict[str, Any]]) -> float:
        module = mixture(layout)
        gain = torch.ones(64)
        gain[::9] = 30.0
        module.weights["norm.weight"] = Constant(gain - 1)  # the builder's norms add one
        exact = logits(module)
        calibrated(module, tmp_path / str(len(passes)), *passes, tokens=tokens(8))
        return float((logits(module) - exact).pow(2).mean())

    plain = loss(("quantize_weights", G32))
    assert loss(("awq", G32), ("quantize_weights", G32)) < 0.8 * plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_proof_covers_experts(layout: str) -> None:
    module = mixture(layout)
    run(module, ("quantize_weights", G32), "quantize_activations")
    result = prove(mixture(layout), module, windows(2, 25, vocab=61), lambda *_: None)
    (layer,) = result["layers"]
    assert layer["name"] == GATE_UP
    assert 1e-4 < layer["output_error"] < 0.1
    alone = sensitivity(module, windows(1, 25, vocab=61), lambda *_: None)
    assert alone[GATE_UP] > 1e-5
    restored_logits = logits(restored(module, keep=()))
    torch.testing.assert_close(restored_logits, logits(mixture(layout)))
