"""Linear layer of codes by codes (FP8 or int8 weights and activations): the tensor cores multiply them as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..eight_bits import LINEAR_8
from ..kernel import CallSite, Scratch, Selection, TmaOperand
from ..tuning import find_linear, linear_form, quantized_form
from ._common import SM_COUNT, cdiv, launch, modelled_us, pdl_release, pdl_wait, pow2, prefetch
from ._eight_bits import Linear8, code_product, group_scales, grouped, read_linear_8, scale_columns, scale_rows
from ._linear import leave_part, take_parts
from .gemm import finish

FLOPS = {80: 0.4e9, 89: 0.24e9, 90: 1.0e9, 100: 2.4e9}
"""Operations a microsecond taken for the model: twice those of ``gemm``; not measured."""


@triton.jit
def gemm_w8a8(
    x, weight, w_ptr, x_scale, scales, bias, residual, out, partial, counter, M,
    N: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr, STATIC: tl.constexpr, SHARED: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, INT: tl.constexpr, INTERVAL: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = (x · weightᵀ) · scales + bias of codes x (M, K) and weight (N, K), FP8 or (INT) int8.

    See ``_linear`` for the gated and residual forms, ``gemm`` for the grid, the parts of K, SWAP, TMA and AHEAD.

    x_scale (M,) fp32, STATIC (1,): a scale a row of x. scales (K / GROUP, N / SHARED): one for SHARED rows of GROUP
    columns of the weight. Where GROUP is K the sums are scaled once, at the end; int8 sums are int32 up to there. Else
    each step's product is scaled and added in fp32. FP8 products are added to fp32 every 128 columns: the tensor
    cores of sm_90 keep some 14 bits of a sum. Floor: max of N·K bytes and 2·M·N·K operations at twice bfloat16's speed.
    """
    WIDTH: tl.constexpr = BN if KIND is None else BN // 2
    COLUMNS: tl.constexpr = N if KIND is None else N // 2
    n0 = tl.program_id(0) * WIDTH
    m0 = tl.program_id(1) * BM
    n = n0 + tl.arange(0, WIDTH)
    m = m0 + tl.arange(0, BM)
    row = tl.where(n < COLUMNS, n, 0)
    PART: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    first = tl.program_id(2) * PART
    EVEN: tl.constexpr = K % (SPLIT * BK) == 0
    k = tl.arange(0, BK)[None, :]
    if AHEAD > 0:
        line = first + tl.arange(0, AHEAD // 128) * 128
        ok = (n < COLUMNS)[:, None] & (line < K)[None, :]
        ahead = w_ptr + n[:, None].to(tl.int64) * K + line[None, :]
        prefetch(ahead, ok, PDL)
        if KIND is not None:
            prefetch(ahead + COLUMNS * K, ok, PDL)
    pdl_release(PDL)
    pdl_wait(PDL)
    SUMS: tl.constexpr = tl.int32 if INT and GROUP == K else tl.float32
    acc = tl.zeros((WIDTH, BM) if SWAP else (BM, WIDTH), SUMS)
    up = acc
    w_at = w_ptr
    x_at = x
    if not TMA:
        w_at = w_ptr + row.to(tl.int64)[:, None] * K + k
        x_at = x + tl.where(m < M, m, 0).to(tl.int64)[:, None] * X_ROW + k
    for start in range(first, first + PART, BK):
        live = start + k < K
        if TMA:
            w = weight.load([n0, start])
            a = x.load([m0, start])
        elif EVEN:
            w = tl.load(w_at + start)
            a = tl.load(x_at + start)
        else:
            w = tl.load(w_at + start, mask=live, other=0.0)
            a = tl.load(x_at + start, mask=live, other=0.0)
        s = 1.0
        if GROUP != K:
            s = group_scales(scales, start, row, n0, 0, N, K, SHARED, GROUP, WIDTH)
        acc = code_product(acc, w, a, s, GROUP == K, SWAP, BK, INTERVAL)
        if KIND is not None:
            if TMA:
                w = weight.load([COLUMNS + n0, start])
            elif EVEN:
                w = tl.load(w_at + COLUMNS * K + start)
            else:
                w = tl.load(w_at + COLUMNS * K + start, mask=live, other=0.0)
            if GROUP != K:
                s = group_scales(scales, start, row, n0, COLUMNS, N, K, SHARED, GROUP, WIDTH)
            up = code_product(up, w, a, s, GROUP == K, SWAP, BK, INTERVAL)
    total = tl.trans(acc).to(tl.float32) if SWAP else acc.to(tl.float32)
    more = tl.trans(up).to(tl.float32) if SWAP else up.to(tl.float32)
    last = True
    if SPLIT > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        last = leave_part(total, more, partial, counter, tile, KIND, BM, BN, WIDTH, SPLIT)
        if last:
            total, more = take_parts(partial, tile, KIND, BM, BN, WIDTH, SPLIT)
            tl.store(counter + tile, 0)
    if last:
        total = scale_rows(total, x_scale, m, M, STATIC)
        if KIND is not None:
            more = scale_rows(more, x_scale, m, M, STATIC)
        if GROUP == K:
            total = scale_columns(total, scales + row // SHARED)
            if KIND is not None:
                more = scale_columns(more, scales + (COLUMNS + row) // SHARED)
        finish(total, more, bias, residual, out, m, n, M, COLUMNS, KIND)


def shape_tiles(linear: Linear8, arch: int) -> dict[str, Any]:
    """Tile sizes, split and launch options for a shape nobody measured: those of ``gemm``, steps of as many bytes."""
    m, n, k = linear.m, linear.n, linear.k
    stages = 4 if arch >= 90 else 3
    c: dict[str, Any] = {"warps": 4, "stages": stages, "SWAP": 0, "AHEAD": 0, "SPLIT": 1, "BK": 128}
    if m <= 64:
        c |= {
            "BM": max(16, pow2(m)),
            "BN": 128 if n >= 16384 or linear.gate is not None else 64,
            "SWAP": 1,
            "AHEAD": 512,
        }
    elif m <= 128 and n < 16384:
        c |= {"BM": 128, "BN": 64}
    else:
        c |= {"BM": 128, "BN": 128, "warps": 8}
    programs, fill = cdiv(n, c["BN"]) * cdiv(m, c["BM"]), 2 * SM_COUNT.get(arch, 108)
    while c["SPLIT"] < 16 and programs * c["SPLIT"] * 2 <= fill and k >= c["SPLIT"] * 4 * c["BK"]:
        c["SPLIT"] *= 2
    return c


def fitted(c: dict[str, Any], linear: Linear8) -> dict[str, Any]:
    """A configuration with tiles no larger than few rows, a short K or a group need."""
    bm = max(16, pow2(linear.m)) if linear.m <= 64 else c["BM"]
    bk = grouped(max(32, min(c["BK"], pow2(linear.k))), linear)
    ahead = min(c["AHEAD"], pow2(linear.k) // 128 * 128)
    bn = max(c["BN"], 128) if linear.gate is not None and c["SWAP"] else c["BN"]  # the instruction's tall side is 64
    return {**c, "BM": bm, "BN": bn, "BK": bk, "SPLIT": min(c["SPLIT"], cdiv(linear.k, bk)), "AHEAD": ahead}


@dataclass(frozen=True)
class GemmW8A8:
    """``cuda.linear_8`` of any number of rows whose codes are in memory."""

    name: str = "gemm_w8a8"
    ops: tuple[str, ...] = (LINEAR_8,)

    def select(self, site: CallSite) -> Selection | str:
        linear = read_linear_8(site)
        if isinstance(linear, str):
            return linear
        m, n, k = linear.m, linear.n, linear.k
        key = quantized_form(site.values, k)
        tuned = find_linear(site.tuning, self.name, key, m, n, k, linear_form(site.values))
        c = fitted(tuned.config if tuned else shape_tiles(linear, site.arch), linear)
        tiles, split = cdiv(n, c["BN"]) * cdiv(m, c["BM"]), c["SPLIT"]
        tma = linear.movable(site.arch)
        box = (c["BN"] if linear.gate is None else c["BN"] // 2, c["BK"])
        tensors = {
            "x": TmaOperand(linear.x, (c["BM"], c["BK"]), spare=True) if tma else linear.x,
            "weight": TmaOperand(linear.weight, box) if tma else None,
            "w_ptr": linear.weight if c["AHEAD"] or not tma else None, **linear.epilogue, "out": linear.out, "M": m,
            "partial": Scratch("partial", 4 * tiles * split * c["BM"] * c["BN"]) if split > 1 else None,
            "counter": Scratch("counter", 4 * tiles, zeroed=True) if split > 1 else None,
        }  # fmt: skip
        constants = {**linear.constants, "X_ROW": linear.x.strides[0], "SWAP": bool(c["SWAP"]), "TMA": tma}
        constants |= {name: c[name] for name in ("BM", "BN", "BK", "SPLIT", "AHEAD")}
        made = launch(
            site.arch, gemm_w8a8, (cdiv(n, c["BN"]), cdiv(m, c["BM"]), split), tensors, constants, warps=c["warps"],
            stages=c["stages"], moved=linear.moved, scratch={"partial": "*fp32", "counter": "*i32"},
        )  # fmt: skip
        cost = max(modelled_us(linear.moved, site.arch, efficiency=0.65), 2 * m * n * k / FLOPS.get(site.arch, 0.4e9))
        why = f"{linear.scheme}, {c['BM']}x{c['BN']}x{c['BK']} tiles" + (f", K in {split}" if split > 1 else "")
        why += f", {tuned.note}" if tuned else ", modelled"
        return Selection((made,), linear.joined + why, tuned.us if tuned else cost)


KERNEL = GemmW8A8()
