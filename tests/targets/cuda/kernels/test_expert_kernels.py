"""Routing reductions and grouped experts: even, skewed and empty routing, both gate layouts, padding rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmopt.ir.ops  # noqa: F401 registers the dialect
from targets.cuda.kernels import moe, routing
from tests.targets.cuda.kernels.harness import close, run

BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(BF16)


@pytest.mark.parametrize("c", [1, 8, 60])
def test_softmax_and_sum(c: int) -> None:
    x = normal(1, 5, c) * 4
    values: dict[str, Any] = {"self": x, "dim": -1, "dtype": "float32"}
    (out,) = run(routing.KERNELS[0], "aten.softmax.int", values, [((1, 5, c), torch.float32)])
    close(out, x.double().softmax(-1))
    values = {"self": x, "dim": (-1,), "keepdim": True, "dtype": None}
    (out,) = run(routing.KERNELS[0], "aten.sum.dim_IntList", values, [((1, 5, 1), BF16)])
    close(out, x.double().sum(-1, keepdim=True))


@pytest.mark.parametrize(("c", "k"), [(1, 1), (8, 2), (60, 8), (128, 8)])
def test_topk(c: int, k: int) -> None:
    x = torch.randperm(5 * c, generator=torch.Generator().manual_seed(c)).view(5, c).float()
    values = {"self": x, "k": k, "dim": -1, "largest": True, "sorted": True}
    found = run(routing.KERNELS[1], "aten.topk.default", values, [((5, k), torch.float32), ((5, k), torch.int64)])
    for got, expected in zip(found, x.topk(k)):
        assert torch.equal(got, expected)


def test_topk_of_equals_and_of_nothing() -> None:
    nan = float("nan")
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0], [nan] * 4, [-torch.inf, nan, 2.0, -torch.inf]])
    values = {"self": x, "k": 3, "dim": 1, "largest": True, "sorted": True}
    _, indices = run(routing.KERNELS[1], "aten.topk.default", values, [((3, 3), torch.float32), ((3, 3), torch.int64)])
    assert indices.tolist() == [[1, 2, 0], [0, 1, 2], [2, 0, 1]]


def operands(index: Tensor, experts: int, c: int, width: int, bias: bool) -> dict[str, Any]:
    rows, k = index.shape
    return {
        "x": normal(rows, c), "index": index, "weight": normal(rows, k, seed=1).softmax(-1),
        "gate_up": normal(experts, 2 * width, c), "down": normal(experts, c, width),
        "gate_up_bias": normal(experts, 2 * width) if bias else None,
        "down_bias": normal(experts, c) if bias else None,
    }  # fmt: skip


def check(v: dict[str, Any], activation: str) -> None:
    rows, c = v["x"].shape
    (out,) = run(moe.KERNEL, "llmopt.moe_experts", {**v, "activation": activation}, [((rows, c), BF16)])
    wide = {n: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in v.items()}
    live = ((v["index"] >= 0) & (v["index"] < len(v["down"]))).all(1)
    wide |= {n: wide[n][live] for n in ("x", "index", "weight")}
    close(out[live], torch.ops.llmopt.moe_experts(**wide, activation=activation), 3)


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
@pytest.mark.parametrize("rows", [1, 7])
def test_experts(activation: str, rows: int) -> None:
    index = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:2] for i in range(rows)])
    check(operands(index, 6, 40, 24, activation == "swiglu_oai"), activation)


def test_skewed_and_empty_routing() -> None:
    check(operands(torch.full((40, 1), 2), 5, 24, 72, True), "gelu_tanh")
    check(operands(torch.tensor([[0, 4]] * 30 + [[4, 0]] * 3), 5, 24, 16, False), "silu")


def test_padding_rows_are_left_out() -> None:
    index = torch.tensor([[1, 0], [-5, 7 << 40], [2, 1]])
    check(operands(index, 3, 24, 16, False), "silu")


def test_a_swapped_choice_is_noticed() -> None:
    v = operands(torch.tensor([[0, 1], [2, 1]]), 3, 24, 16, False)
    (out,) = run(moe.KERNEL, "llmopt.moe_experts", {**v, "activation": "silu"}, [((2, 24), BF16)])
    wide = {n: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in v.items()}
    wide["index"] = wide["index"].flip(1)
    with pytest.raises(AssertionError, match="error"):
        close(out, torch.ops.llmopt.moe_experts(**wide, activation="silu"), 3)
