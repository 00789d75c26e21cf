"""Codes of eight bits for activations: the same scales and roundings, bit for bit, as ``llmopt.round_activations``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_scale(v, static, FP8: tl.constexpr):
    """Each row's scale (ROWS,) fp32 of v (ROWS, BLOCK) fp32, which is 0 beyond the row: the static one, (1,), or its
    largest magnitude over the largest code; 1 where that is 0."""
    LIMIT: tl.constexpr = 448.0 if FP8 else 127.0
    largest = tl.max(tl.abs(v), 1)
    used = tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32))
    if static is not None:
        used = tl.zeros_like(largest) + tl.load(static)
    return tl.where(used == 0, 1.0, used)


@triton.jit
def to_codes(v, used, FP8: tl.constexpr):
    """v / used rounded to the nearest code, ties to even, as fp32. Adding and taking off a number whose last bit is the
    code's last bit rounds without the instruction that older GPUs lack, and in the interpreter, whose own conversion to
    FP8 rounds otherwise."""
    LIMIT: tl.constexpr = 448.0 if FP8 else 127.0
    exact = tl.div_rn(v, tl.broadcast_to(used[:, None], v.shape))
    size = tl.minimum(tl.abs(exact), LIMIT)
    if FP8:
        exponent = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
        big = exponent.to(tl.float32, bitcast=True) * (3 << 19)  # three bits of mantissa, from 2^-6 on
    else:
        big = 3 << 22
    rounded = (size + big) - big
    sign = exact.to(tl.int32, bitcast=True) & -2147483648
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
