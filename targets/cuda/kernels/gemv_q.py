"""Linear layer of one row over integer weights of 4 and 8 bits: codes are multiplied where they are loaded.

A thread takes 16 bytes of a weight row at a time. Of a code in place, everything around it masked off, the bits are
already a number: the subnormal code · 2^(place - 149). So a code costs one bit operation and one multiplication with x
times 2^(80 - place), whose product is code · x · 2^-69, and the places of a word that reach into the exponent one
shift for all. Codes are taken less 8 or 128, or a zero point: a multiple of the sum of x, the same for all rows.
Multiplications must not flush subnormal numbers, which no CUDA instruction does unless told to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..eight_bits import QUANTIZED
from ..fusion import ABSENT, LINEAR_Q
from ..kernel import CallSite, Selection
from ..pack import chunk_of, parts_of
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
from .gemm_q import as_loaded
from .gemv import store_outputs

SCALE, UNDO = tl.constexpr(2.0**-69), tl.constexpr(2.0**69)
"""Of products, which have the subnormal's 2^-149 and x's 2^80, and of the sum."""


@triton.jit
def gemv_q(
    x, codes, scales, zeros, bias, residual, out,
    N: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (N,) = gate(weight · x + bias) + residual, fp32 sums; weight = (code - zero) · scale.

    A program owns ROWS outputs and takes BLOCK times 8 bytes of each row's codes a step. codes: packed as
    targets/cuda/pack.py says in chunks of CHUNK columns; scales and zeros (K / GROUP, N), zeros None where symmetric;
    x bfloat16. With GATE the weight holds N gates above N ups. Codes of the first step are loaded before the wait for
    x, those of each further step before the products of the one before it, but after its columns of x, which would wait
    behind them. A norm is left to a launch of its own: of an 8B layer's on an H200 it takes 1 us, and 5 us in the
    gate's and up's programs. Floor: the codes' bytes.
    """
    LENGTH: tl.constexpr = K * BITS // 64  # of a row, in elements of 8 bytes
    EVEN: tl.constexpr = N % ROWS == 0 and LENGTH % BLOCK == 0
    WEIGHTS: tl.constexpr = N if GATE is None else 2 * N
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
        a, sums = factors(x, i, i < LENGTH, BITS, CHUNK)
        following = start + BLOCK
        if following < LENGTH:
            w = take(at + following, following + e, LENGTH, EVEN)
            if GATE is not None:
                u = take(at + N * LENGTH + following, following + e, LENGTH, EVEN)
        group = tl.minimum(i, LENGTH - 1) // (GROUP * BITS // 64) * WEIGHTS
        spot = group[None, :] + row[:, None]
        part = products(here, a, BITS, CHUNK) - zero_points(sums, zeros, spot, BITS)
        total += part if GROUP == K else part * tl.load(scales + spot).to(tl.float32)
        if GATE is not None:
            part = products(there, a, BITS, CHUNK) - zero_points(sums, zeros, spot + N, BITS)
            more += part if GROUP == K else part * tl.load(scales + spot + N).to(tl.float32)
    result = tl.sum(total, 1) * UNDO
    if GROUP == K:
        result *= tl.load(scales + row).to(tl.float32)
    other = result
    if GATE is not None:
        other = tl.sum(more, 1) * UNDO
        if GROUP == K:
            other *= tl.load(scales + N + row).to(tl.float32)
    store_outputs(result, other, bias, residual, out, n, N, GATE)


@triton.jit
def take(at, e, LENGTH: tl.constexpr, EVEN: tl.constexpr):
    """Elements of codes that nobody needs again."""
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=(e < LENGTH)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def factors(x, i, live, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """What the codes of the elements ``i`` meet: columns of x, four at a time, each by the power of two of its code's
    place; and their sum, as products are scaled."""
    if BITS == 8:  # two parts of four columns
        EACH: tl.constexpr = CHUNK // 8
        spot = i // EACH * (2 * EACH) + i % EACH
        p, sums = columns(x, spot, live, 0, 0)
        q, some = columns(x, spot + EACH, live, 8, 8)
        return (p, q), (sums + some) * SCALE
    elif CHUNK == 32:  # two parts of eight columns
        spot = i // 2 * 8 + i % 2 * 2
        p, sums = four_columns(x, spot, live, 0, 8, 16, 12)
        q, some = four_columns(x, spot + 4, live, 4, 12, 8, 16)
        r, more = four_columns(x, spot + 1, live, 0, 8, 16, 12)
        s, other = four_columns(x, spot + 5, live, 4, 12, 8, 16)
        return (p, q, r, s), ((sums + some) + (more + other)) * SCALE
    else:  # four parts of four columns
        QUARTER: tl.constexpr = CHUNK // 16
        spot = i // QUARTER * (4 * QUARTER) + i % QUARTER
        p, sums = columns(x, spot, live, 0, 16)
        q, some = columns(x, spot + QUARTER, live, 4, 8)
        r, more = columns(x, spot + 2 * QUARTER, live, 8, 12)
        s, other = columns(x, spot + 3 * QUARTER, live, 12, 16)
        return (p, q, r, s), ((sums + some) + (more + other)) * SCALE


@triton.jit
def columns(x, spot, live, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Four neighbouring columns whose codes lie at bits LOW and HIGH in turn."""
    return four_columns(x, spot, live, LOW, HIGH, LOW, HIGH)


@triton.jit
def four_columns(x, spot, live, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Four neighbouring columns of x for each place, of 8 bytes, in fp32, scaled for codes at these bits; and their sum
    as they are."""
    a, b, c, d = four(x, spot, live)
    e: tl.constexpr = 2.0 ** (80 - A)
    f: tl.constexpr = 2.0 ** (80 - B)
    g: tl.constexpr = 2.0 ** (80 - C)
    h: tl.constexpr = 2.0 ** (80 - D)
    return (a * e, b * f, c * g, d * h), (a + b) + (c + d)


@triton.jit
def four(x, spot, live):
    """The bfloat16 numbers of an element of 8 bytes as fp32: their bits are its upper half."""
    q = tl.load(x.to(tl.pointer_type(tl.int64), bitcast=True) + spot, mask=live, other=0)
    low, high = q.to(tl.int32), (q >> 32).to(tl.int32)
    return as_fp32(low << 16), as_fp32(low & -65536), as_fp32(high << 16), as_fp32(high & -65536)


@triton.jit
def as_fp32(bits):
    """int32 as the fp32 number of the same bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def products(elements, a, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """Sums of the codes of each element (ROWS, BLOCK) times the columns ``a``."""
    low, high = elements.to(tl.int32), (elements >> 32).to(tl.int32)
    if BITS == 8:
        p, q = a
        return bytes_times(low, p[0], q[0], p[1], q[1]) + bytes_times(high, p[2], q[2], p[3], q[3])
    else:
        p, q, r, s = a
        if CHUNK == 32:
            found = nibbles_times(low, p[0], q[0], p[1], q[1], p[2], q[2], p[3], q[3])
            return found + nibbles_times(high, r[0], s[0], r[1], s[1], r[2], s[2], r[3], s[3])
        else:
            found = nibbles_times(low, p[0], q[0], r[0], s[0], p[1], q[1], r[1], s[1])
            return found + nibbles_times(high, p[2], q[2], r[2], s[2], p[3], q[3], r[3], s[3])


@triton.jit
def nibbles_times(word, a, b, c, d, e, f, g, h):
    """A word's nibbles, from the low end, times eight columns."""
    upper = word >> 12
    found = as_fp32(word & 0x0000F) * a[None, :]
    found += as_fp32(word & 0x000F0) * b[None, :]
    found += as_fp32(word & 0x00F00) * c[None, :]
    found += as_fp32(word & 0x0F000) * d[None, :]
    found += as_fp32(word & 0xF0000) * e[None, :]
    found += as_fp32(upper & 0x00F00) * f[None, :]
    found += as_fp32(upper & 0x0F000) * g[None, :]
    return found + as_fp32(upper & 0xF0000) * h[None, :]


@triton.jit
def bytes_times(word, a, b, c, d):
    """A word's bytes, codes less 128 from the low end, with 128 added again, times four columns."""
    plain = word ^ -2139062144  # 0x80808080
    upper = plain >> 16
    found = as_fp32(plain & 0x00FF) * a[None, :]
    found += as_fp32(plain & 0xFF00) * b[None, :]
    found += as_fp32(upper & 0x00FF) * c[None, :]
    return found + as_fp32(upper & 0xFF00) * d[None, :]


@triton.jit
def zero_points(sums, zeros, spot, BITS: tl.constexpr):
    """What the zero points (ROWS, BLOCK) add to a step's products."""
    if zeros is None:
        found = ((1 << (BITS - 1)) * sums)[None, :]
    else:
        found = tl.load(zeros + spot).to(tl.float32) * sums[None, :]
    return found


def tile(k: int, bits: int, gated: bool) -> dict[str, int]:
    """Outputs, elements a step and warps of a program nobody measured."""
    block = min(256, pow2(k * bits // 64))
    return {"rows": 2 if gated else 4, "block": block, "warps": max(1, block // 64)}


@dataclass(frozen=True)
class GemvQ:
    """``llmopt.linear_q`` and ``cuda.linear_q`` of one row."""

    name: str = "gemv_q"
    ops: tuple[str, ...] = (QUANTIZED, LINEAR_Q)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = {**ABSENT, **site.values}
        x, codes, (out,), bits, gate = v["x"], v["codes"], site.outputs, v["bits"], v["gate"]
        k, n, group = x.shape[-1], out.shape[-1], v["block_k"]
        layout = rows_of(x)
        if layout is None or layout[0] != 1:
            return "more than one row"
        if x.dtype != "bfloat16":
            return f"activations of {x.dtype}"
        if x.offset % 4:
            return "the row is not aligned"
        if v["format"] != "int" or v["block_n"] != 1:
            return "codes are no integers with a scale a row"
        chunk = chunk_of(bits, group, k)
        if k % chunk:
            return f"rows of {k} columns are no multiple of {chunk}"
        if any(w is not None and not w.contiguous for w in (v["bias"], v["residual"])):
            return "an operand is strided"
        if gate is not None and gate not in ACTIVATIONS:
            return f"activation {gate}"
        tuned = find_linear(site.tuning, self.name, quantized_form(v, k), 1, codes.shape[0], k, linear_form(v))
        c = tuned.config if tuned else tile(k, bits, gate is not None)
        tensors = {
            "x": x, "codes": as_loaded(codes, parts_of(bits, chunk, k) * bits == 16), "scales": v["scales"],
            "zeros": v["zeros"], "bias": v["bias"], "residual": v["residual"], "out": out,
        }  # fmt: skip
        constants = {
            "N": n, "K": k, "GATE": gate, "BITS": bits, "GROUP": group, "CHUNK": chunk, "ROWS": c["rows"],
            "BLOCK": c["block"],
        }  # fmt: skip
        moved = nbytes(x, codes, v["scales"], v["zeros"], v["residual"], out)
        made = launch(site.arch, gemv_q, (cdiv(n, c["rows"]),), tensors, constants, warps=c["warps"], moved=moved)
        why = f"{scheme(v, k)}, one row: {c['rows']} outputs a program"
        why += f", {tuned.note}" if tuned else ", modelled"
        cost = modelled_us(moved, site.arch, efficiency=0.75) - LAUNCH_US / 2
        return Selection((made,), why, tuned.us if tuned else cost)


KERNEL = GemvQ()
