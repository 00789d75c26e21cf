"""The interpreter: equal to the lowered program's, weights one at a time, sizes from the inputs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from llmopt.errors import PassError
from llmopt.ir.interpret import run_module, run_together
from llmopt.ir.module import Module
from llmopt.ir.weights import Weight
from llmopt.lower.lowering import lower
from targets.reference.interpreter import Interpreter, bind_dims
from tests.ir.handmade import Builder, aten, llama


def inputs(rows: int = 7) -> dict[str, torch.Tensor]:
    """One sequence."""
    return {"input_ids": torch.arange(rows)[None] % 17, "position_ids": torch.arange(rows)[None]}


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_equals_the_lowered_program(rows: int) -> None:
    module = llama(2, (0, 5))
    program = lower(module)
    function = program.functions["step"]
    weights = {n: w.tensor() for n, w in module.weights.items()}
    expected = Interpreter(function, weights)(inputs(rows), bind_dims(function, inputs(rows)))
    torch.testing.assert_close(run_module(module, "step", inputs(rows)), expected, rtol=0, atol=0)


def test_sizes_in_arguments_follow_the_inputs() -> None:
    b = Builder()
    x = b.embed(8)
    node = b.call(aten.expand.default, b.weight("row", 1, 1, 8), [1, x.meta["val"].shape[1], 8])
    module = b.finish(b.call(aten.add.Tensor, x, node))
    assert run_module(module, "step", inputs(5))[0].shape == (1, 5, 8)


@dataclass(frozen=True)
class Counted(Weight):
    """A weight that counts reads and how many of its kind are alive."""

    source: Weight
    alive: list[str]
    peak: list[int]
    name: str = ""
    shape: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.source.shape)
        object.__setattr__(self, "dtype", self.source.dtype)

    def read(self, start: int, stop: int) -> torch.Tensor:
        value = self.source.read(start, stop).clone()
        self.alive.append(self.name)
        self.peak[0] = max(self.peak[0], len(self.alive))
        weakref.finalize(value, self.alive.remove, self.name)
        return value


def test_weights_live_only_while_needed() -> None:
    module = llama(4)
    alive: list[str] = []
    peak = [0]
    module.weights = {n: Counted(w, alive, peak, n) for n, w in module.weights.items()}
    run_module(module, "step", inputs())
    assert not alive
    assert peak[0] <= 3


def test_inputs_side_by_side_read_each_weight_once() -> None:
    module, apart = llama(4), llama(4)
    alive: list[str] = []
    reads: list[str] = []

    class Read(Counted):
        def read(self, start: int, stop: int) -> torch.Tensor:
            reads.append(self.name)
            return super().read(start, stop)

    module.weights = {n: Read(w, alive, [0], n) for n, w in module.weights.items()}
    several = [inputs(7), inputs(3), inputs(5)]
    found = run_together(module, "step", several)
    assert len(reads) == len(set(reads)) > 4
    for given, outputs in zip(several, found, strict=True):
        torch.testing.assert_close(outputs, run_module(apart, "step", given), rtol=0, atol=0)
    reads.clear()
    for given in several:
        run_module(module, "step", given)
    assert len(reads) == 3 * len(set(reads))


def test_observes_every_call() -> None:
    module: Module = llama(1)
    seen: dict[str, Any] = {}
    run_module(module, "step", inputs(), lambda node, value: seen.update({node.name: value}))
    calls = [n.name for n in module.functions["step"].graph.nodes if n.op == "call_function"]
    assert set(calls) <= set(seen)


def test_missing_input() -> None:
    with pytest.raises(PassError, match="function step: missing inputs position_ids"):
        run_module(llama(1), "step", {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
