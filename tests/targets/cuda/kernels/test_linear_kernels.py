"""Linear layers: one row, few rows, many rows; odd extents, views, parts of K, descriptors; against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from targets.cuda.kernels import gemm, gemm_persistent, gemv
from tests.targets.cuda.kernels.harness import close, run

LINEAR = "aten.linear.default"
BF16, FP16 = torch.bfloat16, torch.float16


def operands(m: int, n: int, k: int, dtype: torch.dtype, bias: bool, padding: int = 0) -> dict[str, Any]:
    """x (1, m, k) with ``padding`` elements between rows, weight (n, k), bias (n,)."""
    random = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    x = torch.randn(1, m, k + padding, generator=random).to(dtype)[:, :, :k]
    weight = torch.randn(n, k, generator=random).to(dtype)
    return {"input": x, "weight": weight, "bias": torch.randn(n, generator=random).to(dtype) if bias else None}


def exact(v: dict[str, Any]) -> Tensor:
    bias = None if v["bias"] is None else v["bias"].double()
    return torch.nn.functional.linear(v["input"].double(), v["weight"].double(), bias)


def check(kernel: Any, v: dict[str, Any], config: dict[str, Any] | None = None) -> None:
    (m, k), n = v["input"].shape[1:], v["weight"].shape[0]
    tuning = {kernel.name: {f"{str(v['weight'].dtype)[6:]} {m}x{n}x{k}": config}} if config else None
    (out,) = run(kernel, LINEAR, v, [((1, m, n), v["weight"].dtype)], tuning=tuning)
    close(out, exact(v))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 8), (17, 257), (4, 1024), (5, 2049)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_one_row(n: int, k: int, dtype: torch.dtype) -> None:
    check(gemv.KERNEL, operands(1, n, k, dtype, bias=n % 2 == 1))


def test_one_row_of_several_outputs_a_program() -> None:
    check(gemv.KERNEL, operands(1, 7, 300, BF16, True), {"rows": 4, "block": 256, "warps": 4, "us": 1})


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (2, 65, 24), (5, 70, 136), (17, 33, 257), (70, 130, 64)])
def test_few_rows(m: int, n: int, k: int) -> None:
    check(gemm.KERNEL, operands(m, n, k, BF16, bias=m % 2 == 1))


@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("swap", [0, 1])
def test_parts_of_k_are_summed(tma: int, swap: int) -> None:
    config = {
        "BM": 16,
        "BN": 64,
        "BK": 32,
        "SPLIT": 4,
        "SWAP": swap,
        "TMA": tma,
        "AHEAD": 64,
        "warps": 4,
        "stages": 3,
        "us": 1,
    }
    check(gemm.KERNEL, operands(19, 100, 200, BF16, True), config)


def test_rows_of_a_wider_tensor() -> None:
    check(gemm.KERNEL, operands(9, 20, 40, FP16, False, padding=24))
    check(gemm.KERNEL, operands(9, 20, 40, FP16, False, padding=3))


@pytest.mark.parametrize("parts", [1, 2])
def test_persistent_programs_walk_all_tiles(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gemm_persistent.SM_COUNT, 90, 3)
    config = {"BM": 32, "BN": 64, "BK": 32, "GROUP": 2, "PARTS": parts, "warps": 4, "stages": 3, "us": 1}
    check(gemm_persistent.KERNEL, operands(130, 200, 72, BF16, True), config)


def test_a_wrong_weight_is_noticed() -> None:
    v = operands(5, 70, 136, BF16, True)
    (out,) = run(gemm.KERNEL, LINEAR, v, [((1, 5, 70), BF16)])
    v["weight"][69, 135] += 4
    with pytest.raises(AssertionError, match="error"):
        close(out, exact(v))


def test_refusals_name_the_reason() -> None:
    from tests.targets.cuda.kernels.harness import Memory, select

    memory = Memory()
    v = {name: None if x is None else memory.put(name, x) for name, x in operands(3, 4, 8, BF16, False).items()}
    assert select(gemv.KERNEL, LINEAR, v, [memory.put("out", torch.empty(1, 3, 4))]) == "more than one row"
    assert "tile" in str(select(gemm_persistent.KERNEL, LINEAR, v, [memory.put("out", torch.empty(1, 3, 4))]))
