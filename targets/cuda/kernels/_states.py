"""Keys and values as KV states hold them: values, or int8 and FP8 E4M3 codes under a scale a head.

Codes become the numbers they stand for in registers, exactly, in the query's type; scales are left to the softmax and
to the result. On the way in a quotient is rounded to the nearest code and saturates, as llmopt.ir.ops.kv says.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..kernel import Strided
from ._common import INTERPRETED
from ._dequantize import fp8_bytes, signed_bytes

ROUNDER = tl.constexpr(12582912.0)
"""1.5 · 2^23: added to a small number and taken away again, it leaves the nearest integer, ties to even."""


@triton.jit
def decode(codes, DTYPE: tl.constexpr):
    """Codes as numbers of a 16-bit type, without their scale; values as they are."""
    if codes.dtype == tl.int8:
        return signed_bytes(codes.to(tl.uint8, bitcast=True), 0, DTYPE)
    elif codes.dtype == tl.float8e4nv:
        return fp8_bytes(codes.to(tl.uint8, bitcast=True), 0, DTYPE)
    else:
        return codes


@triton.jit
def encode(x, scale, TYPE: tl.constexpr):
    """Values as a state of TYPE keeps them; ``scale`` None: as they are."""
    if scale is None:
        return x.to(TYPE)
    else:
        quotient = tl.div_rn(x.to(tl.float32), scale)
        if TYPE == tl.int8:
            return ((tl.clamp(quotient, -127.0, 127.0) + ROUNDER) - ROUNDER).to(TYPE)
        else:
            quotient = tl.clamp(quotient, -448.0, 448.0)
            if INTERPRETED:
                quotient = nearest_e4m3(quotient)
            return quotient.to(TYPE)


@triton.jit
def nearest_e4m3(x):
    """fp32 numbers rounded to E4M3's, ties to even: Triton's interpreter loses the carry of its own conversion."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0  # units of 2^-9
    return tl.where(tl.abs(x) < 0.015625, small, normal)


CODES = {"int8": "int8", "float8_e4m3fn": "fp8_e4m3"}
"""Types of codes, and the format that ``_dequantize.numbers`` knows them by."""


def unreadable(values: Any, arch: int) -> str | None:
    """Why a call's states cannot be read or written (None: they can)."""
    k, x = values["k_state"], values["v_state"]
    scales: list[Strided | None] = [values.get("k_scale"), values.get("v_scale")]
    if k.dtype != x.dtype:
        return f"keys are {k.dtype}, values {x.dtype}"
    if any((scale is not None) != (k.dtype in CODES) for scale in scales):
        return f"{k.dtype} states with scales {['none' if s is None else s.dtype for s in scales]}"
    if k.dtype == "float8_e4m3fn" and arch < 89:
        return f"sm_{arch} does not convert to FP8: use quantize_kv: {{format: int8}}"
    return None
