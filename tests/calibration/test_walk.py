"""The walk: values equal those of one run, boundaries are taken up again, rewritten pieces are seen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from llmopt.calibration.session import Group, walk_groups
from llmopt.calibration.spool import Spool, Spooled
from llmopt.calibration.walk import Walk
from llmopt.errors import PassError
from llmopt.ir.feed import run_sequence
from llmopt.ir.module import Module
from llmopt.ir.samples import Calibration
from llmopt.ir.sites import Choice, Site, by_input
from llmopt.ir.weights import Constant, Weight
from tests.calibration.running import calibrated, mlp, windows
from tests.ir.handmade import llama
from tests.passes.running import build, run


@dataclass(frozen=True)
class Counted(Weight):
    """A weight that counts how often it is read."""

    value: Weight
    name: str
    reads: Counter[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.value.shape)
        object.__setattr__(self, "dtype", self.value.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        self.reads[self.name] += 1
        return self.value.read(start, stop)


def groups_of(module: Module) -> list[list[Site]]:
    function = module.functions["step"]
    return by_input([site for _, site in Choice("test").sites(module, [function])])


def expected(module: Module, nodes: list[fx.Node], tokens: Tensor) -> dict[str, list[Tensor]]:
    """Values of nodes, each window run at once."""
    found: dict[str, list[Tensor]] = {node.name: [] for node in nodes}
    for window in tokens:
        seen: dict[fx.Node, Any] = {}
        run_sequence(module, "step", window.tolist(), observe=seen.__setitem__)
        for node in nodes:
            found[node.name].append(seen[node])
    return found


@pytest.mark.parametrize("make", [mlp, lambda: llama(2)])
def test_every_input_equals_that_of_one_run(make: Any, tmp_path: Path) -> None:
    module, tokens = make(), windows(3)
    function, groups = module.functions["step"], groups_of(module)
    wanted = expected(module, [g[0].input for g in groups], tokens)
    walk = Walk(module, function, Calibration(tokens, tmp_path), Spool(tmp_path, "k"))
    for group in groups:
        walk.advance(group[0].node)
        for found, exact in zip(walk.values(group[0].input), wanted[group[0].input.name], strict=True):
            torch.testing.assert_close(found, exact)  # views come back contiguous
    assert len(list(tmp_path.glob("boundary-*"))) == 1


def test_a_weight_is_read_once_however_many_windows(tmp_path: Path) -> None:
    module, reads = mlp(), Counter[str]()
    module.weights |= {name: Counted(weight, name, reads) for name, weight in module.weights.items()}
    walk = Walk(module, module.functions["step"], Calibration(windows(5), tmp_path), Spool(tmp_path, "k"))
    for group in groups_of(module):
        walk.advance(group[0].node)
    assert set(reads.values()) == {1}
    assert len(reads) == 8  # all but the last linear, the last norm and the head


def test_a_weight_changed_on_the_way_is_seen(tmp_path: Path) -> None:
    module, tokens = mlp(), windows(2)
    function, groups = module.functions["step"], groups_of(module)
    walk = Walk(module, function, Calibration(tokens, tmp_path), Spool(tmp_path, "k"))
    before = expected(module, [groups[1][0].input], tokens)
    walk.advance(groups[0][0].node)
    name = groups[0][0].weights[0]
    module.weights[name] = Constant(module.weights[name].tensor() * 2)
    after = expected(module, [groups[1][0].input], tokens)
    walk.advance(groups[1][0].node)
    node = groups[1][0].input
    for found, new, old in zip(walk.values(node), after[node.name], before[node.name], strict=True):
        assert torch.equal(found, new)
        assert not torch.equal(found, old)


def test_an_interrupted_walk_is_taken_up_where_it_stood(tmp_path: Path) -> None:
    def walk_until(stop: int) -> tuple[list[int], list[Tensor]]:
        module, ran = mlp(), list[int]()
        groups = groups_of(module)
        calibration = Calibration(windows(2), tmp_path, progress=lambda what, done, total: ran.append(done))
        walk = Walk(module, module.functions["step"], calibration, Spool(tmp_path, "k"))
        for group in groups[:stop]:
            walk.advance(group[0].node)
        return ran, list(walk.values(groups[stop - 1][0].input))

    assert walk_until(2)[0] == [1, 2, 3, 4]
    ran, resumed = walk_until(4)
    assert ran == [5, 6, 7, 8]
    for other in tmp_path.glob("*"):
        assert "partial" not in other.name
    fresh = tmp_path / "fresh"
    module = mlp()
    walk = Walk(module, module.functions["step"], Calibration(windows(2), fresh), Spool(fresh, "k"))
    for group in groups_of(module):
        walk.advance(group[0].node)
    assert all(torch.equal(a, b) for a, b in zip(resumed, walk.values(groups_of(module)[3][0].input), strict=True))


def test_a_folder_of_another_computation_is_emptied(tmp_path: Path) -> None:
    first = Spool(tmp_path / "s", "one")
    first.saved("x", lambda: {"a": torch.ones(2)})
    assert float(Spool(tmp_path / "s", "one").saved("x", lambda: {"a": torch.zeros(2)}).tensors()["a"].sum()) == 2
    assert float(Spool(tmp_path / "s", "two").saved("x", lambda: {"a": torch.zeros(2)}).tensors()["a"].sum()) == 0


def test_a_spooled_weight_reads_rows(tmp_path: Path) -> None:
    value = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
    weight = Spooled(Spool(tmp_path, "k").saved("x", lambda: {"a": value}).path, "a")
    assert weight.shape == (4, 3)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.read(1, 3), value[1:3])


def test_activations_that_are_not_finite_name_their_layer(tmp_path: Path) -> None:
    module = mlp()
    name = "layers.0.up_proj.weight"
    broken = module.weights[name].tensor()
    broken[3, 5] = float("inf")
    module.weights[name] = Constant(broken)
    with pytest.raises(PassError, match=r"layer layers\.0\.down_proj\.weight: the activations hold NaN or infinity"):
        calibrated(module, tmp_path, ("awq", {"group_size": 32}))


def test_a_module_with_states_is_refused(tmp_path: Path) -> None:
    module = llama(1)
    run(module, "rewrite_kv_cache")
    with pytest.raises(PassError, match="one function without KV states"):
        calibrated(module, tmp_path, ("gptq", {"group_size": None}))


def test_no_text_is_an_error_that_says_what_to_give() -> None:
    with pytest.raises(PassError, match="no calibration text"):
        run(mlp(), ("gptq", {"group_size": 32}))


def test_groups_share_an_input(tmp_path: Path) -> None:
    module = mlp(layers=1)
    sites = [site for _, site in Choice("test").sites(module, [module.functions["step"]])]
    calibration = Calibration(windows(2), tmp_path)
    found: list[Group] = list(walk_groups(build("awq"), module, module.functions["step"], sites, calibration))
    assert [len(g.sites) for g in found] == [2, 1]
