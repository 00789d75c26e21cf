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
from ._dequantize import signed_bytes

ROUNDER = tl.constexpr(12582912.0)
"""1.5 · 2^23: added to a small number and taken away again, it leaves the nearest integer, ties to even."""

E4M3 = {
    "bf16": (4, "0x07f007f0", "0x7b807b80", "fma.rn.bf16x2"),
    "fp16": (1, "0x3f803f80", "0x5c005c00", "fma.rn.f16x2"),
}
"""How far a byte in the upper half of 16 bits goes down, where its exponent and mantissa are then, the power of two
between the biases (2^120, 2^8) twice, and multiplication with addition."""


def e4m3_as(type_: str) -> Any:
    """PTX that turns four E4M3 codes into numbers: the bits moved into place are the number over a power of two, below
    the least normal number too. NaN, which no code written here is, becomes 480."""
    shift, mask, power, fma = E4M3[type_]
    halves = "\n".join(
        f"shr.b32 v, {half}, {shift};\nand.b32 v, v, {mask};\nlop3.b32 v, {half}, 0x80008000, v, 0xea;\n"
        f"{fma} {out}, v, p, n;"
        for out, half in (("$0", "t"), ("$1", "u"))
    )
    return tl.constexpr(
        "{ .reg .b32 t, u, v, z, p, n;\nmov.b32 z, 0;\nprmt.b32 t, $2, z, 0x1404;\nprmt.b32 u, $2, z, 0x3424;\n"
        f"mov.b32 p, {power};\nmov.b32 n, 0x80008000;\n{halves} }}"
    )


E4M3_BF16, E4M3_FP16 = e4m3_as("bf16"), e4m3_as("fp16")


@triton.jit
def decode(codes, DTYPE: tl.constexpr):
    """Codes as numbers of a 16-bit type, without their scale; values as they are."""
    if codes.dtype == tl.int8:
        return signed_bytes(codes.to(tl.uint8, bitcast=True), 0, DTYPE)
    elif codes.dtype == tl.float8e4nv:
        b = codes.to(tl.uint8, bitcast=True)
        if INTERPRETED:
            found = codes.to(tl.float32).to(DTYPE)
        elif DTYPE == tl.bfloat16:
            found = tl.inline_asm_elementwise(E4M3_BF16, "=r,=r,r", [b], tl.bfloat16, True, 4)
        else:
            found = tl.inline_asm_elementwise(E4M3_FP16, "=r,=r,r", [b], tl.float16, True, 4)
        return found
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


CODES = ("int8", "float8_e4m3fn")


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
