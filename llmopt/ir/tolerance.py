"""How far two correct evaluations of one model may differ: from the dtype and the longest reduction, nowhere else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAFETY = 4.0
"""Headroom over the random-walk estimate; a wrong window, scale or weight is orders of magnitude above it."""


def tolerance(dtype: torch.dtype, reduction: int, depth: int = 1) -> float:
    """Bound on ``row_error`` between two evaluations that round at different places.

    Each of ``depth`` stages in sequence rounds its result once to ``dtype`` (half an ulp, adding like a random
    walk), and sums ``reduction`` products in fp32 (fp64 for fp64) in another order.
    """
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    storage = torch.finfo(dtype).eps / 2
    return SAFETY * (storage * math.sqrt(depth) + accumulator * math.sqrt(reduction))


def code_step(dtype: torch.dtype) -> float:
    """Distance between neighbouring codes of a quantized state, relative to the largest of them: two evaluations that
    differ in the last bit may round to either."""
    return 1 / 127 if dtype == torch.int8 else torch.finfo(dtype).eps


def row_error(actual: Tensor, expected: Tensor) -> float:
    """Largest relative L2 error of a row (the last axis); infinite when only one of the two is NaN."""
    a, b = (t.double().reshape(-1, t.shape[-1] if t.dim() else 1) for t in (actual, expected))
    both = a.isnan() & b.isnan()
    a, b = a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)
    if a.isnan().any() or b.isnan().any():
        return math.inf
    if not a.numel():
        return 0.0
    # a row that is nearly zero beside the others is judged by their scale
    scale = torch.maximum(b.norm(dim=-1), b.norm() / math.sqrt(b.shape[0])).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((a - b).norm(dim=-1) / scale).max())
