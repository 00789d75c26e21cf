"""Tolerances: reordered sums stay inside, real mistakes do not; the error measure sees one bad row and NaN."""

from __future__ import annotations

import math

import pytest
import torch

from llmopt.ir.tolerance import row_error, tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", [16, 512, 8192])
def test_covers_another_order_of_summation(dtype: torch.dtype, reduction: int) -> None:
    generator = torch.Generator().manual_seed(reduction)
    x = torch.randn(4, reduction, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(8, reduction, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    order = torch.randperm(reduction, generator=generator)
    first = (x.to(wide) @ w.to(wide).T).to(dtype)
    second = (x[:, order].to(wide) * 1.0 @ w[:, order].to(wide).T).to(dtype)
    bound = tolerance(dtype, reduction)
    assert row_error(second, first) <= bound
    assert row_error(first.double() * (1 + 10 * bound), first) > bound


def test_grows_with_depth_and_reduction() -> None:
    assert tolerance(torch.bfloat16, 64, depth=16) > tolerance(torch.bfloat16, 64)
    assert tolerance(torch.float32, 4096) > tolerance(torch.float32, 64)
    assert tolerance(torch.float32, 4096, depth=64) < 1e-4


def test_row_error_sees_one_bad_row() -> None:
    good = torch.ones(1000, 4)
    bad = good.clone()
    bad[7] *= 1.01
    assert row_error(bad, good) == pytest.approx(0.01, rel=1e-3)


def test_row_error_and_nan() -> None:
    clean, dirty = torch.ones(2, 3), torch.tensor([[1.0, float("nan"), 1.0], [1.0, 1.0, 1.0]])
    assert row_error(dirty, clean) == math.inf
    assert row_error(clean, dirty) == math.inf
    assert row_error(dirty, dirty) == 0.0
    assert row_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_row_error_scales_a_vanishing_row_by_the_others() -> None:
    expected = torch.tensor([[1.0, 1.0], [0.0, 1e-9]])
    assert row_error(expected + 1e-8, expected) < 1e-7
