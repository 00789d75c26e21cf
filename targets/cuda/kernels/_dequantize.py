"""Codes of quantized weights as numbers the tensor cores multiply: exact integers, scaled after the product."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._common import INTERPRETED


def nibbles_asm(shift: int, type_: str) -> Any:
    """PTX that turns four bytes into their low (shift 0) or high (4) nibbles less 8, as four 2-byte floats.

    A nibble under a byte of exponent is the number 128 + n (bfloat16) or 1024 + n (float16): byte permutations, no
    integer conversion; one packed subtraction takes the 128 + 8 off again.
    """
    exponent, one, bias, op = {
        "bf16": ("0x43434343", "0x3f803f80", "0xc308c308", "fma.rn.bf16x2"),
        "fp16": ("0x64646464", "0x3c003c00", "0xe408e408", "fma.rn.f16x2"),
    }[type_]
    return tl.constexpr(
        "{ .reg .b32 t, e, o, b;\n"
        f"shr.u32 t, $2, {shift};\nand.b32 t, t, 0x0f0f0f0f;\n"
        f"mov.b32 e, {exponent};\nmov.b32 o, {one};\nmov.b32 b, {bias};\n"
        "prmt.b32 $0, t, e, 0x4140;\nprmt.b32 $1, t, e, 0x4342;\n"
        f"{op} $0, $0, o, b;\n{op} $1, $1, o, b; }}"
    )


LOW_BF16, HIGH_BF16 = nibbles_asm(0, "bf16"), nibbles_asm(4, "bf16")
LOW_FP16, HIGH_FP16 = nibbles_asm(0, "fp16"), nibbles_asm(4, "fp16")


@triton.jit
def low_nibbles(b, DTYPE: tl.constexpr):
    """Low nibbles of uint8 ``b``, less 8."""
    if INTERPRETED:
        found = ((b & 15).to(tl.float32) - 8).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        found = tl.inline_asm_elementwise(LOW_BF16, "=r,=r,r", [b], tl.bfloat16, True, 4)
    else:
        found = tl.inline_asm_elementwise(LOW_FP16, "=r,=r,r", [b], tl.float16, True, 4)
    return found


@triton.jit
def high_nibbles(b, DTYPE: tl.constexpr):
    """High nibbles of uint8 ``b``, less 8."""
    if INTERPRETED:
        found = ((b >> 4).to(tl.float32) - 8).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        found = tl.inline_asm_elementwise(HIGH_BF16, "=r,=r,r", [b], tl.bfloat16, True, 4)
    else:
        found = tl.inline_asm_elementwise(HIGH_FP16, "=r,=r,r", [b], tl.float16, True, 4)
    return found


@triton.jit
def signed_bytes(b, DTYPE: tl.constexpr):
    """uint8 ``b`` read as int8."""
    b = b.to(tl.int8, bitcast=True)
    return b.to(tl.float32).to(DTYPE) if INTERPRETED else b.to(DTYPE)
