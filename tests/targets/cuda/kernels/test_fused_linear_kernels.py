"""``cuda.linear``: norm before, gate or residual after, for one row and for few; against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from targets.cuda.fusion import LINEAR
from targets.cuda.kernels import gemv
from tests.targets.cuda.kernels.harness import close, run

BF16, FP16 = torch.bfloat16, torch.float16
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def operands(
    m: int, n: int, k: int, dtype: torch.dtype = BF16, *, bias: bool = False, norm: bool = False, offset: float = 0.0,
    gate: str | None = None, residual: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """x (1, m, k), weight (n or 2n, k), and what the call joins to it."""
    random = torch.Generator().manual_seed(m * 7919 + n * 31 + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    rows = n if gate is None else 2 * n
    return {
        "input": 3 * draw(1, m, k), "weight": draw(rows, k) / k**0.5, "bias": draw(rows) if bias else None,
        "norm": draw(k) if norm else None, "eps": 1e-3, "offset": offset, "gate": gate,
        "residual": draw(1, m, n) if residual else None,
    }  # fmt: skip


def exact(v: dict[str, Any]) -> Tensor:
    """The call in float64, rounded nowhere."""
    x = v["input"].double()
    if v["norm"] is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + v["eps"]) * (v["norm"].double() + v["offset"])
    out = torch.nn.functional.linear(x, v["weight"].double(), None if v["bias"] is None else v["bias"].double())
    if v["gate"] is not None:
        a, b = out.chunk(2, dim=-1)
        out = ACTIVATIONS[v["gate"]](a) * b
    return out if v["residual"] is None else out + v["residual"].double()


def compute(kernel: Any, v: dict[str, Any], config: dict[str, Any] | None = None) -> Tensor:
    (m, k), rows = v["input"].shape[1:], v["weight"].shape[0]
    n = rows if v["gate"] is None else rows // 2
    dtype = v["weight"].dtype
    tuning = {kernel.name: {f"{str(dtype)[6:]} {m}x{rows}x{k}": config}} if config else None
    (out,) = run(kernel, LINEAR, v, [((1, m, n), dtype)], tuning=tuning)
    return out


PARTS: list[dict[str, Any]] = [
    {"norm": True},
    {"norm": True, "offset": 1.0, "bias": True},
    {"residual": True, "bias": True},
    {"gate": "silu", "bias": True},
    {"gate": "gelu_tanh", "norm": True},
    {"gate": "relu", "norm": True, "residual": True},
]


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts))
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 8), (17, 257), (5, 2049)])
def test_one_row(n: int, k: int, parts: dict[str, Any]) -> None:
    v = operands(1, n, k, FP16 if n == 17 else BF16, **parts)
    close(compute(gemv.KERNEL, v), exact(v))


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts))
def test_one_row_of_several_outputs_a_program(parts: dict[str, Any]) -> None:
    v = operands(1, 7, 300, **parts)
    close(compute(gemv.KERNEL, v, {"rows": 4, "block": 256, "warps": 4}), exact(v))


def test_a_norm_without_its_weight_is_noticed() -> None:
    v = operands(1, 17, 257, norm=True)
    out = compute(gemv.KERNEL, v)
    v["norm"] = torch.ones_like(v["norm"])
    with pytest.raises(AssertionError, match="error"):
        close(out, exact(v))
