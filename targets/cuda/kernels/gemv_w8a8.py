"""Linear layer of codes by codes for one row: the weight is read once, each code a number after two bit operations.

The seven low bits of an E4M3 code at bits 20 to 26 are the fp32 number times 2^-120, subnormal ones too, under its
sign; a byte of an integer is one as in gemv_q. Products of codes are exact in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..eight_bits import LINEAR_8
from ..kernel import CallSite, Selection
from ..tuning import find_linear, linear_form, quantized_form
from ._common import (
    ACTIVATIONS,
    LAUNCH_US,
    cdiv,
    launch,
    modelled_us,
    nbytes,
    pdl_release,
    pdl_wait,
    pow2,
    rows_of,
)
from ._eight_bits import scheme
from .gemv import store_outputs
from .gemv_q import SCALE, UNDO, as_fp32, bytes_times, take

FP8_SCALE, FP8_UNDO = tl.constexpr(2.0**60), tl.constexpr(2.0**60)
"""Of x's numbers, and of the sum: together they undo the weights' 2^-120."""


@triton.jit
def gemv_w8a8(
    x, x_scale, codes, scales, bias, residual, out,
    N: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, GATE: tl.constexpr,
    FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (N,) = gate(weight · x + bias) + residual: the row's codes x (K,) with their scale x_scale (1,) times
    ``codes`` (N, K), (2N, K) with GATE, of FP8 or int8; scales (K / GROUP, N / SHARED).

    A program owns ROWS outputs and takes BLOCK times 8 codes of each a step, loaded before the products of the step
    before it, the first before the wait for x. Floor: the codes' N · K bytes.
    """
    LENGTH: tl.constexpr = K // 8
    EVEN: tl.constexpr = N % ROWS == 0 and LENGTH % BLOCK == 0
    TABLE: tl.constexpr = (N if GATE is None else 2 * N) // SHARED
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.where(n < N, n, 0)
    e = tl.arange(0, BLOCK)
    at = codes.to(tl.pointer_type(tl.int64), bitcast=True) + row.to(tl.int64)[:, None] * LENGTH + e[None, :]
    w = take(at, e, LENGTH, EVEN)
    u = w
    if GATE is not None:
        u = take(at + N * LENGTH, e, LENGTH, EVEN)
    pdl_release(PDL)
    pdl_wait(PDL)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    more = total
    for start in range(0, LENGTH, BLOCK):
        here, there = w, u
        i = start + e
        words = tl.load(x.to(tl.pointer_type(tl.int64), bitcast=True) + i, mask=i < LENGTH, other=0)
        left, some = four_of(words.to(tl.int32), FP8)
        right, others = four_of((words >> 32).to(tl.int32), FP8)
        following = start + BLOCK
        if following < LENGTH:
            w = take(at + following, following + e, LENGTH, EVEN)
            if GATE is not None:
                u = take(at + N * LENGTH + following, following + e, LENGTH, EVEN)
        spot = (tl.minimum(i, LENGTH - 1) * 8 // GROUP * TABLE)[None, :]
        part = times(here, left, right, some + others, FP8)
        total += part if GROUP == K else part * tl.load(scales + spot + (row // SHARED)[:, None]).to(tl.float32)
        if GATE is not None:
            part = times(there, left, right, some + others, FP8)
            up = ((N + row) // SHARED)[:, None]
            more += part if GROUP == K else part * tl.load(scales + spot + up).to(tl.float32)
    used = tl.load(x_scale).to(tl.float32) * (FP8_UNDO if FP8 else UNDO)
    result = tl.sum(total, 1) * used
    if GROUP == K:
        result *= tl.load(scales + row // SHARED).to(tl.float32)
    other = result
    if GATE is not None:
        other = tl.sum(more, 1) * used
        if GROUP == K:
            other *= tl.load(scales + (N + row) // SHARED).to(tl.float32)
    store_outputs(result, other, bias, residual, out, n, N, GATE)


@triton.jit
def four_of(word, FP8: tl.constexpr):
    """The numbers of a word's four codes of x, scaled for the weights' codes, and their sum as products are scaled."""
    a, b, c, d = number(word, FP8), number(word >> 8, FP8), number(word >> 16, FP8), number(word >> 24, FP8)
    if FP8:
        return (a * FP8_SCALE, b * FP8_SCALE, c * FP8_SCALE, d * FP8_SCALE), a
    else:
        low: tl.constexpr = 2.0**80
        high: tl.constexpr = 2.0**72
        return (a * low, b * high, c * low, d * high), ((a + b) + (c + d)) * SCALE


@triton.jit
def number(word, FP8: tl.constexpr):
    """The code in a word's lowest byte, in fp32."""
    code = word.to(tl.int8)
    return code.to(tl.float8e4nv, bitcast=True).to(tl.float32) if FP8 else code.to(tl.float32)


@triton.jit
def times(elements, left, right, sums, FP8: tl.constexpr):
    """Sums of the eight codes of each element (ROWS, BLOCK) times columns of x, of which ``sums`` is the sum."""
    low, high = elements.to(tl.int32), (elements >> 32).to(tl.int32)
    if FP8:
        return e4m3_times(low, left) + e4m3_times(high, right)
    else:
        found = bytes_times(low, left[0], left[1], left[2], left[3])
        found += bytes_times(high, right[0], right[1], right[2], right[3])
        return found - (128 * sums)[None, :]


@triton.jit
def e4m3_times(word, a):
    """A word's four E4M3 codes, from the low end, times 2^-120 and four columns."""
    found = e4m3(word << 24) * a[0][None, :]
    found += e4m3(word << 16) * a[1][None, :]
    found += e4m3(word << 8) * a[2][None, :]
    return found + e4m3(word) * a[3][None, :]


@triton.jit
def e4m3(word):
    """The E4M3 code in a word's highest byte times 2^-120: the arithmetic shift leaves its sign."""
    return as_fp32((word >> 4) & -2014314496)  # 0x87F00000


def tile(k: int, gated: bool) -> dict[str, int]:
    """Outputs, elements a step and warps of a program nobody measured."""
    block = min(128, pow2(k // 8))
    return {"rows": 2 if gated else 4, "block": block, "warps": max(1, block // 64)}


@dataclass(frozen=True)
class GemvW8A8:
    """``cuda.linear_8`` of one row of codes."""

    name: str = "gemv_w8a8"
    ops: tuple[str, ...] = (LINEAR_8,)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        x, codes, gate, (out,) = v["x"], v["codes"], v["gate"], site.outputs
        layout, k, n, group = rows_of(x), codes.shape[1], out.shape[-1], v["block_k"]
        if layout is None or layout[0] != 1:
            return "more than one row"
        if k % 8 or x.offset % 8 or (group < k and group % 8):
            return f"rows or groups of {k} and {group} columns are no multiple of 8"
        if gate is not None and gate not in ACTIVATIONS:
            return f"activation {gate}"
        tuned = find_linear(site.tuning, self.name, quantized_form(v, k), 1, codes.shape[0], k, linear_form(v))
        c = tuned.config if tuned else tile(k, gate is not None)
        constants = {
            "N": n, "K": k, "SHARED": v["block_n"], "GROUP": group, "GATE": gate, "FP8": v["format"] == "fp8_e4m3",
            "ROWS": c["rows"], "BLOCK": c["block"],
        }  # fmt: skip
        tensors = {
            "x": x, "x_scale": v["x_scale"], "codes": codes, "scales": v["scales"], "bias": v["bias"],
            "residual": v["residual"], "out": out,
        }  # fmt: skip
        moved = nbytes(codes, v["scales"], x, out)
        made = launch(site.arch, gemv_w8a8, (cdiv(n, c["rows"]),), tensors, constants, warps=c["warps"], moved=moved)
        why = f"{scheme(v, k)}, one row: {c['rows']} outputs a program"
        why += f", {tuned.note}" if tuned else ", modelled"
        cost = modelled_us(moved, site.arch, efficiency=0.85) - LAUNCH_US / 2
        return Selection((made,), why, tuned.us if tuned else cost)


KERNEL = GemvW8A8()
