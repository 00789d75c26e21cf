"""Codes of quantized weights as numbers the tensor cores multiply: exact integers, scaled after the product.

A code under the exponent of 128 (bfloat16) or 1024 (float16) is that number plus the code: bit operations on two codes
at a time and one packed addition take the place of conversions. Triton's interpreter runs the plain form beside it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._common import INTERPRETED

FLOATS = {
    "bf16": ("0x43004300", "0x3f803f80", "0xc308c308", "fma.rn.bf16x2"),
    "fp16": ("0x64006400", "0x3c003c00", "0xe408e408", "fma.rn.f16x2"),
}
"""Exponent, one and the negative of exponent + 8, twice each; multiplication with addition, which sm_80 has too."""


def nibbles_of_halfwords(part: int, type_: str) -> Any:
    """PTX that turns two halfwords into their nibbles number ``part``, less 8."""
    exponent, one, bias, fma = FLOATS[type_]
    return tl.constexpr(
        "{ .reg .b32 t, o, b;\n"
        f"shr.u32 t, $1, {4 * part};\nlop3.b32 t, t, 0x000f000f, {exponent}, 0xea;\n"
        f"mov.b32 o, {one};\nmov.b32 b, {bias};\n{fma} $0, t, o, b; }}"
    )


def nibbles_of_bytes(part: int, type_: str) -> Any:
    """PTX that turns four bytes into their nibbles number ``part``, less 8."""
    exponent, one, bias, fma = FLOATS[type_]
    return tl.constexpr(
        "{ .reg .b32 t, e, o, b;\n"
        f"shr.u32 t, $2, {4 * part};\nand.b32 t, t, 0x0f0f0f0f;\n"
        f"mov.b32 e, {exponent};\nmov.b32 o, {one};\nmov.b32 b, {bias};\n"
        f"prmt.b32 $0, t, e, 0x5150;\nprmt.b32 $1, t, e, 0x5352;\n"
        f"{fma} $0, $0, o, b;\n{fma} $1, $1, o, b; }}"
    )


def bytes_of_halfwords(part: int, type_: str) -> Any:
    """PTX that turns two halfwords into their bytes number ``part`` as int8: see ``signed_bytes_as``."""
    return tl.constexpr(
        f"{{ .reg .b32 t, u, o;\nmov.b32 o, {FLOATS[type_][1]};\nshr.u32 t, $1, {8 * part};\n"
        f"and.b32 t, t, 0x00ff00ff;\n{signed('$0', type_)} }}"
    )


def signed(out: str, type_: str) -> str:
    """PTX from two bytes in the halves of ``t`` to numbers in ``out``."""
    exponent, _, _, fma = FLOATS[type_]
    if type_ == "bf16":
        split = f"lop3.b32 u, t, 0x007f007f, {exponent}, 0xea;\nlop3.b32 t, t, 0x00800080, 0xc300c300, 0xea;"
    else:
        split = "xor.b32 u, t, 0x64806480;\nmov.b32 t, 0xe480e480;"
    return f"{split}\n{fma} {out}, u, o, t;"


def signed_bytes_as(type_: str) -> Any:
    """PTX that turns four int8 into numbers. Seven bits fit bfloat16's mantissa: of a byte with the upper bit set, 256
    is subtracted, of others 128; float16's takes all eight."""
    first, second = signed("$0", type_), signed("$1", type_)
    return tl.constexpr(
        f"{{ .reg .b32 t, u, z, o;\nmov.b32 z, 0;\nmov.b32 o, {FLOATS[type_][1]};\n"
        f"prmt.b32 t, $2, z, 0x4140;\n{first}\nprmt.b32 t, $2, z, 0x4342;\n{second} }}"
    )


FP8 = {
    "bf16": (4, "0x07f007f0", "0x7b807b80", "fma.rn.bf16x2"),
    "fp16": (7, "0x3f803f80", "0x5c005c00", "fma.rn.f16x2"),
}
"""How far left the seven low bits of an E4M3 code move in a halfword, where they then lie, and 2^120 or 2^8 twice: what
turns the larger exponent range's bias into E4M3's; subnormal codes come out right."""


def e4m3(out: str, left: str, right: str, type_: str) -> str:
    """PTX from E4M3 codes to numbers in ``out``: ``left`` puts their seven low bits in place, ``right`` their signs."""
    _, mask, factor, fma = FP8[type_]
    return (
        f"{left}\n{right}\nand.b32 u, u, {mask};\nlop3.b32 u, s, 0x80008000, u, 0xea;\n"
        f"mov.b32 o, {factor};\nmov.b32 z, 0x80008000;\n{fma} {out}, u, o, z;"
    )


def e4m3_of_halfwords(part: int, type_: str) -> Any:
    """PTX that turns two halfwords into their bytes number ``part``, as E4M3."""
    shift = FP8[type_][0]
    moves = (f"shl.b32 u, $1, {shift};", "shl.b32 s, $1, 8;") if part == 0 else (upper(shift, "$1"), "mov.b32 s, $1;")
    return tl.constexpr(f"{{ .reg .b32 u, s, z, o;\n{e4m3('$0', *moves, type_)} }}")


def upper(shift: int, source: str) -> str:
    """PTX that moves codes in the upper bytes of halfwords."""
    return f"shr.b32 u, {source}, {8 - shift};"


def e4m3_as(type_: str) -> Any:
    """PTX that turns four E4M3 bytes into numbers."""
    moves = (upper(FP8[type_][0], "t"), "mov.b32 s, t;")
    first, second = e4m3("$0", *moves, type_), e4m3("$1", *moves, type_)
    return tl.constexpr(
        f"{{ .reg .b32 t, u, s, z, o;\nmov.b32 z, 0;\nprmt.b32 t, $2, z, 0x1404;\n{first}\n"
        f"mov.b32 z, 0;\nprmt.b32 t, $2, z, 0x3424;\n{second} }}"
    )


HALFWORDS = {
    type_: {
        "int4": tuple(nibbles_of_halfwords(part, type_).value for part in range(4)),
        "int8": tuple(bytes_of_halfwords(part, type_).value for part in range(2)),
        "fp8_e4m3": tuple(e4m3_of_halfwords(part, type_).value for part in range(2)),
    }
    for type_ in FLOATS
}
"""PTX from two halfwords, $1, to their codes number part as numbers, $0: by the numbers' type and the codes' form."""

E2M1 = {
    "bf16": (6, "0x01c001c0", "0x7e807e80", "fma.rn.bf16x2"),
    "fp16": (9, "0x0e000e00", "0x74007400", "fma.rn.f16x2"),
}
"""The same of the three low bits of an E2M1 code (MXFP4): 2^126 or 2^14."""


def e2m1_of_bytes(part: int, type_: str) -> Any:
    """PTX that turns four bytes into their nibbles number ``part``, as E2M1."""
    shift, mask, factor, fma = E2M1[type_]

    def pair(out: str, bytes_: str) -> str:
        return (
            f"prmt.b32 s, t, z, {bytes_};\nshl.b32 u, s, {shift};\nshl.b32 s, s, 12;\n"
            f"and.b32 u, u, {mask};\nlop3.b32 u, s, 0x80008000, u, 0xea;\n{fma} {out}, u, o, n;"
        )

    return tl.constexpr(
        f"{{ .reg .b32 t, u, s, z, o, n;\nshr.u32 t, $2, {4 * part};\nand.b32 t, t, 0x0f0f0f0f;\n"
        f"mov.b32 z, 0;\nmov.b32 o, {factor};\nmov.b32 n, 0x80008000;\n"
        f"{pair('$0', '0x4140')}\n{pair('$1', '0x4342')} }}"
    )


def listed(type_: str, form: str) -> Any:
    """A line of HALFWORDS as device functions of Triton take it."""
    return tl.constexpr(tuple(map(tl.constexpr, HALFWORDS[type_][form])))


HALFWORDS_BF16 = listed("bf16", "int4")
HALFWORDS_FP16 = listed("fp16", "int4")
BYTES_BF16 = tl.constexpr(tuple(nibbles_of_bytes(part, "bf16") for part in range(2)))
BYTES_FP16 = tl.constexpr(tuple(nibbles_of_bytes(part, "fp16") for part in range(2)))
PAIRS_BF16 = listed("bf16", "int8")
PAIRS_FP16 = listed("fp16", "int8")
SIGNED_BF16, SIGNED_FP16 = signed_bytes_as("bf16"), signed_bytes_as("fp16")
FP8_PAIRS_BF16 = listed("bf16", "fp8_e4m3")
FP8_PAIRS_FP16 = listed("fp16", "fp8_e4m3")
FP8_BF16, FP8_FP16 = e4m3_as("bf16"), e4m3_as("fp16")
E2M1_BF16 = tl.constexpr(tuple(e2m1_of_bytes(part, "bf16") for part in range(2)))
E2M1_FP16 = tl.constexpr(tuple(e2m1_of_bytes(part, "fp16") for part in range(2)))


@triton.jit
def numbers(b, PART: tl.constexpr, BITS: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Codes number PART, from the low end, of the elements ``b``: integers less 8 or 128, or values of FORMAT."""
    if FORMAT == "fp8_e4m3":
        found = fp8_bytes(b, PART, DTYPE)
    elif FORMAT == "mxfp4":
        found = e2m1_nibbles(b, PART, DTYPE)
    elif BITS == 8:
        found = signed_bytes(b, PART, DTYPE)
    else:
        found = nibbles(b, PART, DTYPE)
    return found


@triton.jit
def e2m1_nibbles(b, PART: tl.constexpr, DTYPE: tl.constexpr):
    """Nibbles number PART, counted from the low end, of uint8 ``b``, as E2M1."""
    tl.static_assert(b.dtype == tl.uint8)
    if INTERPRETED:
        code = ((b >> (4 * PART)) & 15).to(tl.int32)
        size = tl.where(code & 6 == 0, 0.5 * (code & 1), (1 + 0.5 * (code & 1)) * ((1 << ((code >> 1) & 3)) // 2))
        found = tl.where(code >= 8, -size, size).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        found = tl.inline_asm_elementwise(E2M1_BF16[PART], "=r,=r,r", [b], tl.bfloat16, True, 4)
    else:
        found = tl.inline_asm_elementwise(E2M1_FP16[PART], "=r,=r,r", [b], tl.float16, True, 4)
    return found


@triton.jit
def nibbles(b, PART: tl.constexpr, DTYPE: tl.constexpr):
    """Nibbles number PART, counted from the low end, of int16 or uint8 ``b``, less 8."""
    if INTERPRETED:
        found = (((b >> (4 * PART)) & 15).to(tl.float32) - 8).to(DTYPE)
    elif b.dtype == tl.int16:
        if DTYPE == tl.bfloat16:
            found = tl.inline_asm_elementwise(HALFWORDS_BF16[PART], "=r,r", [b], tl.bfloat16, True, 2)
        else:
            found = tl.inline_asm_elementwise(HALFWORDS_FP16[PART], "=r,r", [b], tl.float16, True, 2)
    else:
        if DTYPE == tl.bfloat16:
            found = tl.inline_asm_elementwise(BYTES_BF16[PART], "=r,=r,r", [b], tl.bfloat16, True, 4)
        else:
            found = tl.inline_asm_elementwise(BYTES_FP16[PART], "=r,=r,r", [b], tl.float16, True, 4)
    return found


@triton.jit
def signed_bytes(b, PART: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes number PART, counted from the low end, of int16 or uint8 ``b``, as int8."""
    if INTERPRETED:
        found = (b >> (8 * PART)).to(tl.int8).to(tl.float32).to(DTYPE)
    elif b.dtype == tl.int16:
        if DTYPE == tl.bfloat16:
            found = tl.inline_asm_elementwise(PAIRS_BF16[PART], "=r,r", [b], tl.bfloat16, True, 2)
        else:
            found = tl.inline_asm_elementwise(PAIRS_FP16[PART], "=r,r", [b], tl.float16, True, 2)
    else:
        if DTYPE == tl.bfloat16:
            found = tl.inline_asm_elementwise(SIGNED_BF16, "=r,=r,r", [b], tl.bfloat16, True, 4)
        else:
            found = tl.inline_asm_elementwise(SIGNED_FP16, "=r,=r,r", [b], tl.float16, True, 4)
    return found


@triton.jit
def fp8_bytes(b, PART: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes number PART, counted from the low end, of int16 or uint8 ``b``, as E4M3."""
    if INTERPRETED:
        found = (b >> (8 * PART)).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32).to(DTYPE)
    elif b.dtype == tl.int16:
        if DTYPE == tl.bfloat16:
            found = tl.inline_asm_elementwise(FP8_PAIRS_BF16[PART], "=r,r", [b], tl.bfloat16, True, 2)
        else:
            found = tl.inline_asm_elementwise(FP8_PAIRS_FP16[PART], "=r,r", [b], tl.float16, True, 2)
    else:
        if DTYPE == tl.bfloat16:
            found = tl.inline_asm_elementwise(FP8_BF16, "=r,=r,r", [b], tl.bfloat16, True, 4)
        else:
            found = tl.inline_asm_elementwise(FP8_FP16, "=r,=r,r", [b], tl.float16, True, 4)
    return found


PAIRED_BF16, PAIRED_FP16 = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;"), tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")


@triton.jit
def paired(a, b, c):
    """a · b + c, which broadcast, in their dtype, two at a time."""
    if INTERPRETED:
        found = (a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32)).to(a.dtype)
    elif a.dtype == tl.bfloat16:
        found = tl.inline_asm_elementwise(PAIRED_BF16, "=r,r,r,r", [a, b, c], tl.bfloat16, True, 2)
    else:
        found = tl.inline_asm_elementwise(PAIRED_FP16, "=r,r,r,r", [a, b, c], tl.float16, True, 2)
    return found
