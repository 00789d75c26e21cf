"""Linear layer over weights of 4 and 8 bits: codes become numbers in registers, scales meet each group's sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from llmopt.program import dtype_bytes

from ..eight_bits import QUANTIZED
from ..fusion import ABSENT, LINEAR_Q
from ..kernel import CallSite, Scratch, Selection, Strided
from ..pack import chunk_of, parts_of
from ..tuning import find_linear, linear_form, quantized_form
from ._common import ACTIVATIONS, SM_COUNT, cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, pow2, prefetch
from ._dequantize import numbers, paired
from ._eight_bits import scheme
from ._linear import flattened, leave_part, take_parts
from .gemm import FLOPS, finish

FIRST_US, CODES = 4.0, 2.9e6
"""What few rows wait for, seen of four shapes on an H200 over 4 bits and 8: some microseconds, then codes a microsecond
that become numbers."""


@triton.jit
def gemm_q(
    x, codes, scales, zeros, bias, residual, out, partial, counter, M,
    N: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, FORMAT: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr,
    SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, fp32 sums; weight = (code - zero) · scale, a scale for SHARED rows
    of GROUP columns.

    codes: packed as targets/cuda/pack.py says, or int8 or FP8 as they are; scales and zeros (K / GROUP, N / SHARED),
    zeros None where symmetric. BK divides GROUP (or covers all of K) and is, of int4, the chunk of the packing. Grid
    (N tiles, M tiles, SPLIT); with SPLIT > 1 the last part to come adds all parts in order. Tiles are computed
    transposed: the weights are the tall side of the tensor core's instruction, rows of x its narrow one. Codes stay
    integers (less 8 or 128) or values of FORMAT up to the product, so nothing is rounded there; a zero point is a
    multiple of the sum of x. SCALED: the weights, rounded to x's dtype, are what is multiplied, which leaves more
    registers for the sums of many rows. With a gate (KIND) the weight holds N / 2 gates above N / 2 ups. The first
    AHEAD bytes of each of the tile's rows go to L2 before the wait for x. Floor: the codes' N · K · BITS / 8 bytes.
    """
    WIDTH: tl.constexpr = BN if KIND is None else BN // 2
    COLUMNS: tl.constexpr = N if KIND is None else N // 2
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = tl.where(n < COLUMNS, n, 0)
    PART: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    EVEN: tl.constexpr = K % (SPLIT * BK) == 0
    first = tl.program_id(2) * PART
    PARTS: tl.constexpr = codes.dtype.element_ty.primitive_bitwidth // BITS
    WIDE: tl.constexpr = BK // PARTS
    ROW: tl.constexpr = K // PARTS
    UPS: tl.constexpr = COLUMNS * ROW
    h = tl.arange(0, WIDE)[None, :]
    c_at = codes + row.to(tl.int64)[:, None] * ROW + h
    x_at = x + tl.where(m < M, m, 0).to(tl.int64)[:, None] * X_ROW + h
    if AHEAD > 0:
        LINE: tl.constexpr = 128 * 8 // (BITS * PARTS)
        line = first // PARTS + tl.arange(0, AHEAD // 128)[None, :] * LINE
        ok = (n < COLUMNS)[:, None] & (line < ROW)
        ahead = codes + row.to(tl.int64)[:, None] * ROW + line
        prefetch(ahead, ok, PDL)
        if KIND is not None:
            prefetch(ahead + UPS, ok, PDL)
    pdl_release(PDL)
    pdl_wait(PDL)
    a_type: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((WIDTH, BM), tl.float32)
    up = acc
    for start in range(first, first + PART, BK):
        live = start // PARTS + h < ROW
        b = tl.load(c_at + start // PARTS) if EVEN else tl.load(c_at + start // PARTS, mask=live, other=0)
        u = b
        if KIND is not None:
            if EVEN:
                u = tl.load(c_at + UPS + start // PARTS)
            else:
                u = tl.load(c_at + UPS + start // PARTS, mask=live, other=0)
        group = tl.minimum(start, K - 1) // GROUP * (N // SHARED)
        part = acc if GROUP == K or SCALED else tl.zeros((WIDTH, BM), tl.float32)
        scale = row
        zero = row
        if SCALED:
            scale = tl.load(scales + group + row // SHARED).to(a_type)
            if zeros is not None:
                zero = ((1 << (BITS - 1)) - tl.load(zeros + group + row // SHARED).to(tl.float32)).to(a_type)
        sums = tl.zeros((BM, WIDE), tl.float32)
        for i in tl.static_range(PARTS):
            k = start + i * WIDE
            a = tl.load(x_at + k) if EVEN else tl.load(x_at + k, mask=k + h < K, other=0.0)
            if zeros is not None and not SCALED:
                sums += a.to(tl.float32)
            part = tl.dot(weights(b, i, scale, zero, zeros, BITS, FORMAT, a_type, SCALED), tl.trans(a), part)
        if SCALED:
            acc = part
        else:
            acc = add_group(acc, part, sums, scales, zeros, group + row // SHARED, BITS, GROUP == K)
        if KIND is not None:
            tl.static_assert(not SCALED)
            part = up if GROUP == K else tl.zeros((WIDTH, BM), tl.float32)
            for i in tl.static_range(PARTS):
                k = start + i * WIDE
                a = tl.load(x_at + k) if EVEN else tl.load(x_at + k, mask=k + h < K, other=0.0)
                part = tl.dot(numbers(u, i, BITS, FORMAT, a.dtype), tl.trans(a), part)
            up = add_group(up, part, sums, scales, zeros, group + (COLUMNS + row) // SHARED, BITS, GROUP == K)
    if GROUP == K and not SCALED:
        acc *= tl.load(scales + row // SHARED).to(tl.float32)[:, None]
        if KIND is not None:
            up *= tl.load(scales + (COLUMNS + row) // SHARED).to(tl.float32)[:, None]
    total = tl.trans(acc)
    more = tl.trans(up)
    if SPLIT > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if leave_part(total, more, partial, counter, tile, KIND, BM, BN, WIDTH, SPLIT):
            total, more = take_parts(partial, tile, KIND, BM, BN, WIDTH, SPLIT)
            finish(total, more, bias, residual, out, m, n, M, COLUMNS, KIND)
            tl.store(counter + tile, 0)
    else:
        finish(total, more, bias, residual, out, m, n, M, COLUMNS, KIND)


@triton.jit
def weights(
    b, i, scale, zero, zeros, BITS: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr
):
    """Numbers of the codes in part i of a tile, less their zero points and scaled where SCALED."""
    found = numbers(b, i, BITS, FORMAT, DTYPE)
    if SCALED:
        if zeros is not None:
            found = paired(found, tl.full(found.shape, 1.0, DTYPE), zero[:, None])
        found = paired(found, scale[:, None], tl.full(found.shape, -0.0, DTYPE))
    return found


@triton.jit
def add_group(acc, part, sums, scales, zeros, at, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """A chunk's product with its zero points taken off, scaled and added to acc (WIDTH, BM).

    ``at``: where each weight row's scale and zero lie. WHOLE: one scale serves all of K and is left to the caller, and
    ``part`` is the sum so far.
    """
    if zeros is not None:
        z = tl.load(zeros + at).to(tl.float32)
        part += ((1 << (BITS - 1)) - z)[:, None] * tl.sum(sums, 1)[None, :]
    return part if WHOLE else acc + part * tl.load(scales + at).to(tl.float32)[:, None]


def shape_tiles(m: int, n: int, k: int, bits: int, gated: bool, arch: int) -> dict[str, Any]:
    """Tile sizes and split for a shape nobody measured: programs to fill the GPU four times, unless what the parts of
    K leave and take up again were more bytes than the weight. Of many rows weights are scaled first: 2048 take 0.75
    times as long so on an H200. 128 gated rows spill 8 bytes on sm_80: 64 there."""
    bm = max(16, min(128 if arch >= 90 else 64, pow2(m)))
    if m >= 256 and arch >= 90 and not gated:
        return {"BM": bm, "BN": 128, "SPLIT": 1, "AHEAD": 0, "SCALED": 1, "warps": 8, "stages": 3}
    c: dict[str, Any] = {"BM": bm, "BN": 128 if gated or bm > 32 else 64, "SPLIT": 1, "AHEAD": 256 if bm <= 64 else 0}
    c |= {"warps": 8 if bm > 64 else 4, "stages": 4 if arch >= 90 and bm <= 64 else 3}
    programs, fill = cdiv(n, c["BN"]) * cdiv(m, bm), 4 * SM_COUNT.get(arch, 108)
    most = min(k // 512, k * bits // (64 * bm))
    while c["SPLIT"] * 2 <= min(8, most) and programs * c["SPLIT"] * 2 <= fill:
        c["SPLIT"] *= 2
    return c


def as_loaded(codes: Strided, wide: bool) -> Strided:
    """Codes as the elements that the kernel loads: halfwords or bytes."""
    return as_elements(codes, "int16" if wide else "uint8")


def as_elements(codes: Strided, dtype: str) -> Strided:
    """Bytes of codes, dense in each row, as elements of an integer type."""
    size = dtype_bytes(dtype)
    strides = (*(s // size for s in codes.strides[:-1]), 1)
    return replace(codes, dtype=dtype, shape=(*codes.shape[:-1], codes.shape[-1] // size), strides=strides)


def read_rows(v: Mapping[str, Any], out: Strided) -> tuple[Strided, Strided, Strided | None] | str:
    """x, result and residual of a linear over codes as (rows, columns), or why the kernels over tiles cannot do it."""
    x, found, residual = flattened(v["x"]), flattened(out), flattened(v["residual"])
    if x is None or found is None or (residual is None) != (v["residual"] is None):
        return "the rows are not evenly spaced"
    if x.dtype not in ("bfloat16", "float16"):
        return f"activations of {x.dtype}"
    if not found.contiguous or not (residual is None or residual.contiguous):
        return "the results are strided"
    if v["gate"] is not None and v["gate"] not in ACTIVATIONS:
        return f"activation {v['gate']}"
    return x, found, residual


@dataclass(frozen=True)
class GemmQ:
    """``llmopt.linear_q`` and ``cuda.linear_q`` of weights of 4 and 8 bits, any number of rows."""

    name: str = "gemm_q"
    ops: tuple[str, ...] = (QUANTIZED, LINEAR_Q)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = {**ABSENT, **site.values}
        codes, gate, bits = v["codes"], v["gate"], v["bits"]
        rows = read_rows(v, site.outputs[0])
        if isinstance(rows, str):
            return rows
        x, out, residual = rows
        (m, k), n, group = x.shape, codes.shape[0], v["block_k"]
        tuned = find_linear(site.tuning, self.name, quantized_form(v, k), m, n, k, linear_form(v))
        c = dict(tuned.config) if tuned else shape_tiles(m, n, k, bits, gate is not None, site.arch)
        bk = chunk_of(bits, group, k)
        c["BM"], c["SPLIT"] = min(c["BM"], max(16, pow2(m))), min(c["SPLIT"], cdiv(k, bk))
        tiles, split = cdiv(out.shape[1], c["BN"] // (1 if gate is None else 2)) * cdiv(m, c["BM"]), c["SPLIT"]
        stored = as_loaded(codes, codes.dtype == "uint8" and parts_of(bits, bk, k) * bits == 16)
        tensors = {
            "x": x, "codes": stored, "scales": v["scales"], "zeros": v["zeros"], "bias": v["bias"],
            "residual": residual, "out": out, "M": m,
            "partial": Scratch("partial", 4 * tiles * split * c["BM"] * c["BN"]) if split > 1 else None,
            "counter": Scratch("counter", 4 * tiles, zeroed=True) if split > 1 else None,
        }  # fmt: skip
        constants = {
            "N": n, "K": k, "X_ROW": x.strides[0], "KIND": gate,
            "BITS": bits, "FORMAT": v["format"], "SHARED": v["block_n"], "GROUP": group,
            "BM": c["BM"], "BN": c["BN"], "BK": bk, "SPLIT": split, "AHEAD": c["AHEAD"],
            "SCALED": bool(c.get("SCALED", 0)) and gate is None,
        }  # fmt: skip
        moved = nbytes(x, codes, v["scales"], v["zeros"], residual, out)
        made = launch(
            site.arch, gemm_q, (tiles // cdiv(m, c["BM"]), cdiv(m, c["BM"]), split), tensors, constants,
            warps=c["warps"], stages=c["stages"], moved=moved,
            scratch={"partial": "*fp32", "counter": "*i32"},
        )  # fmt: skip
        cost = max(modelled_us(moved, site.arch), FIRST_US + n * k / CODES, 2 * m * n * k / FLOPS.get(site.arch, 0.2e9))
        why = f"{scheme(v, k)}, {c['BM']}x{c['BN']}x{bk} tiles" + (f", K in {split}" if split > 1 else "")
        why += f", {tuned.note}" if tuned else ", modelled"
        return Selection((made,), why, tuned.us if tuned else cost)


KERNEL = GemmQ()
