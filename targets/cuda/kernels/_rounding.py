"""Codes of eight bits for activations: the same scales and roundings, bit for bit, as ``llmopt.round_activations``."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import INTERPRETED


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
def quotients(v, used):
    """v (ROWS, BLOCK) over its rows' scales, correctly rounded: by the reciprocal and one step of correction
    (Markstein), a third of the division's instructions. Scales too small for a reciprocal are first multiplied by 2^64,
    their rows too; quotients that overflow, or vanish, have nothing to correct. The interpreter has no fused
    multiplication."""
    if INTERPRETED:
        found = tl.div_rn(v, tl.broadcast_to(used[:, None], v.shape))
    else:
        up = tl.where(used < 2.0**-60, 2.0**64, 1.0)
        divisor = used * up
        inverse = tl.div_rn(tl.full(used.shape, 1.0, tl.float32), divisor)
        divisor = tl.broadcast_to(divisor[:, None], v.shape)
        inverse = tl.broadcast_to(inverse[:, None], v.shape)
        a = v * up[:, None]
        q = a * inverse
        better = tl.fma(tl.fma(-q, divisor, a), inverse, q)
        found = tl.where((tl.abs(q) < 2.0**20) & (q != 0), better, q)
    return found


@triton.jit
def to_codes(v, used, FP8: tl.constexpr):
    """v / used rounded to the nearest code, ties to even, as fp32. Adding and taking off a number whose last bit is the
    code's last bit rounds without the instruction that older GPUs lack, and in the interpreter, whose own conversion to
    FP8 rounds otherwise."""
    LIMIT: tl.constexpr = 448.0 if FP8 else 127.0
    exact = quotients(v, used)
    size = tl.minimum(tl.abs(exact), LIMIT)
    if FP8:
        exponent = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
        big = exponent.to(tl.float32, bitcast=True) * (3 << 19)  # three bits of mantissa, from 2^-6 on
    else:
        big = 3 << 22
    rounded = (size + big) - big
    sign = exact.to(tl.int32, bitcast=True) & -2147483648
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
