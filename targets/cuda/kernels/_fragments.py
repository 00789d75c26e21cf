"""Tiles as mma.sync takes them from registers, loaded from memory in 16 bytes a thread (Gluon).

The instruction multiplies 16 rows by 16 columns: thread 4·g + t of a warp holds columns 2t, 2t + 1, 2t + 8 and 2t + 9
of rows g and g + 8. Which of K's columns these are does not matter as long as both operands agree, so each thread reads
neighbouring halfwords and calls them what the instruction wants. Nothing passes through shared memory.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ._dequantize import FLOATS, HALFWORDS


def by_halves(asm: str) -> str:
    """PTX of two halfwords in a word, $1 to $0, with the two results in registers of their own: $2 to $0 and $1."""
    inner = asm.replace("$1", "$2").replace("$0", "w")
    return f"{{ .reg .b32 w;\n{inner}\nmov.b32 {{$0, $1}}, w; }}"


def less_zeros(asm: str, type_: str) -> str:
    """The same of nibbles less a zero point each, whose addend, twice, is $3, in place of less 8."""
    return asm.replace(FLOATS[type_][2], "$3")


def forms(type_: str) -> dict[str, tuple[str, ...]]:
    """PTX for each part of a halfword, by the codes' form."""
    plain = {form: tuple(map(by_halves, parts)) for form, parts in HALFWORDS[type_].items()}
    return {**plain, "int4 zeros": tuple(less_zeros(asm, type_) for asm in plain["int4"])}


FORMS = {"bf16": forms("bf16"), "fp16": forms("fp16")}


@gluon.constexpr_function
def ptx(form: str, part: int, type_: str) -> str:
    """PTX that turns a word's two codes number ``part`` into numbers."""
    return FORMS[type_][form][part]


@gluon.constexpr_function
def powers(first: int, stop: int, axis: int) -> list[list[int]]:
    """Bases of a layout over three axes: powers of two from ``first`` up to below ``stop`` along one."""
    found = []
    while first < stop:
        found.append([first if i == axis else 0 for i in range(3)])
        first *= 2
    return found


@gluon.constexpr_function
def weight_layout(k_warps: int, row_warps: int, rows: int, words: int, run: int) -> Any:
    """Of (k_warps, rows, words): a thread holds ``run`` neighbours of every 4 · run words of rows g, g + 8, …; a warp
    has every ``row_warps``-th 16 rows of one of ``k_warps`` parts."""
    registers = [*powers(1, run, 2), *powers(4 * run, words, 2), *powers(8, 16, 1), *powers(16 * row_warps, rows, 1)]
    lanes = [*powers(run, 4 * run, 2), *powers(1, 8, 1)]
    warps = [*powers(16, 16 * row_warps, 1), *powers(1, k_warps, 0)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [k_warps, rows, words])


@gluon.constexpr_function
def input_layout(k_warps: int, row_warps: int, rows: int, columns: int, run: int) -> Any:
    """Of (k_warps, rows, columns) of x, as ``weight_layout`` but that warps of one part of K hold the same rows."""
    registers = [*powers(1, run, 2), *powers(4 * run, columns, 2), *powers(8, rows, 1)]
    lanes = [*powers(run, 4 * run, 2), *powers(1, 8, 1)]
    warps = [*([[0, 0, 0]] * (row_warps.bit_length() - 1)), *powers(1, k_warps, 0)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [k_warps, rows, columns])


@gluon.jit
def fragments(v, RUN: gl.constexpr):
    """A tile's columns (parts, rows, columns) renamed: of each 4 · RUN, a thread's RUN neighbours become RUN / 4 pairs
    of the first and second eight columns of an instruction."""
    P: gl.constexpr = v.shape[0]
    R: gl.constexpr = v.shape[1]
    C: gl.constexpr = v.shape[2]
    apart = gl.reshape(v, (P, R, C // (4 * RUN), 4, RUN // 4, 2, 2))
    return gl.reshape(gl.permute(apart, (0, 1, 2, 4, 5, 3, 6)), (P, R, C))


@gluon.jit
def numbers(words, addend, FORM: gl.constexpr, PART: gl.constexpr, DTYPE: gl.constexpr):
    """Codes number PART of the halfwords in (parts, rows, words), as (parts, rows, 2 · words) numbers of DTYPE.

    ``addend``: what ``zero_addend`` gives; of forms without zero points it is not read."""
    if DTYPE == gl.bfloat16:
        low, high = gl.inline_asm_elementwise(
            ptx(FORM, PART, "bf16"), "=h,=h,r,r", [words, addend], (gl.bfloat16, gl.bfloat16), True, 1
        )
    else:
        low, high = gl.inline_asm_elementwise(
            ptx(FORM, PART, "fp16"), "=h,=h,r,r", [words, addend], (gl.float16, gl.float16), True, 1
        )
    return gl.reshape(gl.join(low, high), (words.shape[0], words.shape[1], 2 * words.shape[2]))


@gluon.jit
def zero_addend(zeros, DTYPE: gl.constexpr):
    """What takes zero points (parts, rows) and the exponent off nibbles under it, twice in a word: (parts, rows, 1)."""
    EXPONENT: gl.constexpr = 128.0 if DTYPE == gl.bfloat16 else 1024.0
    bits = (-EXPONENT - zeros.to(gl.float32)).to(DTYPE).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return (bits * 0x10001)[:, :, None]


@gluon.jit
def multiply(weights, inputs, acc, RUN: gl.constexpr):
    """acc (parts, rows, M) and the products of weights (parts, rows, K) and inputs (parts, M, K), as they lie."""
    MMA: gl.constexpr = acc.type.layout
    a = gl.convert_layout(fragments(weights, RUN), gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
    turned = gl.permute(fragments(inputs, RUN), (0, 2, 1))
    return mma_v2(a, gl.convert_layout(turned, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True), acc)
