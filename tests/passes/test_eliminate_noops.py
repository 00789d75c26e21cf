"""eliminate_noops: each kind of no-op goes, look-alikes stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.ir.interpret import run_module
from tests.ir.handmade import Builder, aten
from tests.passes.running import ops, rewrites, run, text

NOOPS: dict[str, Any] = {
    "clone": lambda b, x: b.call(aten.clone.default, x),
    "contiguous": lambda b, x: b.call(aten.contiguous.default, x),
    "cast": lambda b, x: b.call(aten.to.dtype, x, torch.float32),
    "view": lambda b, x: b.call(aten.view.default, x, [1, b.call(aten.sym_size.int, x, 1), 8]),
    "expand": lambda b, x: b.call(aten.expand.default, x, [1, -1, 8]),
    "slice": lambda b, x: b.call(aten.slice.Tensor, x, 1, 0, 9223372036854775807),
    "dropout": lambda b, x: b.call(aten.dropout.default, x, 0.1, False),
    "add zero": lambda b, x: b.call(aten.add.Tensor, x, 0),
    "times one": lambda b, x: b.call(aten.mul.Tensor, x, 1.0),
    "cat": lambda b, x: b.call(aten.cat.default, [x], 1),
    "transposes": lambda b, x: b.call(aten.transpose.int, b.call(aten.transpose.int, x, 1, 2), -1, 1),
}
WORK: dict[str, Any] = {
    "cast": lambda b, x: b.call(aten.to.dtype, b.call(aten.to.dtype, x, torch.bfloat16), torch.float32),
    "slice": lambda b, x: b.call(aten.slice.Tensor, x, 2, 0, 4),
    "add": lambda b, x: b.call(aten.add.Tensor, x, 1),
    "add a tensor": lambda b, x: b.call(aten.add.Tensor, x, x),
    "times minus one": lambda b, x: b.call(aten.mul.Tensor, x, -1.0),
    "broadcast": lambda b, x: b.call(aten.mul.Tensor, b.weight("w", 1), x),
    "transpose": lambda b, x: b.call(aten.transpose.int, b.call(aten.transpose.int, x, 1, 2), 0, 2),
}


@pytest.mark.parametrize("kind", NOOPS)
def test_fires(kind: str) -> None:
    b = Builder()
    module = b.finish(b.linear(NOOPS[kind](b, b.embed(8)), "head", 17))
    assert rewrites(module, "eliminate_noops") >= 1
    assert ops(module) == ["aten.embedding", "aten.linear"]


@pytest.mark.parametrize("kind", WORK)
def test_must_not_fire(kind: str) -> None:
    b = Builder()
    module = b.finish(WORK[kind](b, b.embed(8)))
    before = ops(module)
    assert rewrites(module, "eliminate_noops") == 0
    assert ops(module) == before


def chained() -> Any:
    """Views of views of a copy, and a weight nothing reads."""
    b = Builder()
    x = b.call(aten.transpose.int, b.heads(b.embed(8), 2), 1, 2)
    x = b.call(aten.contiguous.default, b.call(aten.mul.Tensor, x, 2.0))
    size = b.call(aten.sym_size.int, x, 1)
    x = b.call(aten.view.default, b.call(aten.view.default, x, [1, size, 4, 2]), [1, size, -1])
    module = b.finish(b.linear(x, "head", 17))
    module.weights["unread.weight"] = module.weights["head.weight"]
    return module


def test_numerics_unchanged() -> None:
    module = chained()
    inputs = {"input_ids": torch.tensor([[3, 1, 4, 1, 5]]), "position_ids": torch.arange(5)[None]}
    before = run_module(module, "step", inputs)[0]
    run(module, "eliminate_noops")
    assert "unread.weight" not in module.weights
    torch.testing.assert_close(run_module(module, "step", inputs)[0], before, rtol=0, atol=0)


def test_golden_text() -> None:
    module = chained()
    run(module, "eliminate_noops")
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
) {
  #
  %embedding_0 : f32[1, T, 8] = aten.embedding(@embed.weight, %input_ids)
  %sym_size_0 : T = aten.sym_size.int(%embedding_0, 1)
  %reshape_0 : f32[1, T, 2, 4] = aten.reshape(%embedding_0, (1, %sym_size_0, 2, 4))
  %mul_0 : f32[1, T, 2, 4] = aten.mul.Tensor(%reshape_0, 2.0)
  %sym_size_1 : T = aten.sym_size.int(%mul_0, 1)
  %reshape_1 : f32[1, T, 8] = aten.reshape(%mul_0, (1, %sym_size_1, -1))
  %linear_0 : f32[1, T, 17] = aten.linear(%reshape_1, @head.weight)
  return (%linear_0)
}
""",
    )
