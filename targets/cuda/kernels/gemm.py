"""Linear layer of up to a few hundred rows: one tile a program, K in parts where tiles are too few."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Scratch, Selection, Strided, TmaOperand
from ..tuning import find_linear
from ._common import (
    SM_COUNT,
    cdiv,
    launch,
    modelled_us,
    nbytes,
    pdl_release,
    pdl_wait,
    pow2,
    prefetch,
    rows_of,
)

FLOPS = {80: 0.2e9, 89: 0.12e9, 90: 0.55e9, 100: 1.2e9}
"""Operations a microsecond: what one tile a program reaches of the tensor cores."""


@triton.jit
def gemm(
    x, weight, w_ptr, bias, out, partial, counter,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, fp32 sums. Grid (N tiles, M tiles, SPLIT).

    With SPLIT > 1, each part of K leaves its sum in ``partial``; the last to come (``counter``, left zero) adds
    them in order, so that results do not depend on timing. ``SWAP`` computes the transposed tile, so that few rows
    become the narrow side of the tensor core's instruction, whose tall side has at least 64. ``TMA``: x and weight
    are descriptors with boxes (BM, BK) and (BN, BK), else pointers (x dense in K, X_ROW between rows; weight is
    ``w_ptr``). The first AHEAD columns of the tile's weights go to L2 before the wait for x.
    Floor: max of 2·N·K bytes and 2·M·N·K operations.
    """
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * BM
    n = n0 + tl.arange(0, BN)
    m = m0 + tl.arange(0, BM)
    PART: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    first = tl.program_id(2) * PART
    EVEN: tl.constexpr = K % (SPLIT * BK) == 0
    if AHEAD > 0:
        line = first + tl.arange(0, AHEAD // 64) * 64
        prefetch(w_ptr + n[:, None].to(tl.int64) * K + line[None, :], (n < N)[:, None] & (line < K)[None, :], PDL)
    pdl_release(PDL)
    pdl_wait(PDL)
    acc = tl.zeros((BN, BM), tl.float32) if SWAP else tl.zeros((BM, BN), tl.float32)
    if TMA:
        for start in range(first, first + PART, BK):
            w = weight.load([n0, start])
            a = x.load([m0, start])
            acc = tl.dot(w, tl.trans(a), acc) if SWAP else tl.dot(a, tl.trans(w), acc)
    else:
        k = tl.arange(0, BK)[None, :]
        w_at = w_ptr + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K + k
        x_at = x + tl.where(m < M, m, 0).to(tl.int64)[:, None] * X_ROW + k
        for start in range(first, first + PART, BK):
            if EVEN:
                w = tl.load(w_at + start)
                a = tl.load(x_at + start)
            else:
                w = tl.load(w_at + start, mask=start + k < K, other=0.0)
                a = tl.load(x_at + start, mask=start + k < K, other=0.0)
            acc = tl.dot(w, tl.trans(a), acc) if SWAP else tl.dot(a, tl.trans(w), acc)
    total = tl.trans(acc) if SWAP else acc
    if SPLIT > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        spot = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        mine = partial + (tile * SPLIT + tl.program_id(2)).to(tl.int64) * (BM * BN)
        tl.store(mine + spot, total)
        tl.debug_barrier()
        came = tl.atomic_add(counter + tile, 1, sem="acq_rel")
        if came == SPLIT - 1:
            tl.debug_barrier()
            total = tl.zeros((BM, BN), tl.float32)
            for part in range(SPLIT):
                total += tl.load(partial + (tile * SPLIT + part).to(tl.int64) * (BM * BN) + spot, cache_modifier=".cg")
            finish(total, bias, out, m, n, M, N)
            tl.store(counter + tile, 0)
    else:
        finish(total, bias, out, m, n, M, N)


@triton.jit
def finish(total, bias, out, m, n, M: tl.constexpr, N: tl.constexpr):
    """Bias, rounding and the store of a tile."""
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    ok = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], total.to(out.dtype.element_ty), mask=ok)


def shape_tiles(m: int, n: int, k: int, arch: int) -> dict[str, Any]:
    """Tile sizes, split and launch options for a shape nobody measured: what won at the nearest measured ones."""
    wide = n >= 16384
    c: dict[str, Any] = {"warps": 4, "stages": 4 if arch >= 90 else 3, "SWAP": 0, "AHEAD": 0, "SPLIT": 1}
    if m <= 64:
        c |= {"BM": max(16, pow2(m)), "BN": 128 if wide else 64, "BK": 128, "SWAP": 1, "AHEAD": 256}
    elif m <= 128 and not wide:
        c |= {"BM": 128, "BN": 64, "BK": 128 if arch >= 90 else 64}
    elif arch >= 90:
        c |= {"BM": 256 if wide and m > 128 else 128, "BN": 128, "BK": 64, "warps": 8}
    else:
        c |= {"BM": 128, "BN": 64, "BK": 64}
    programs, fill = cdiv(n, c["BN"]) * cdiv(m, c["BM"]), 2 * SM_COUNT.get(arch, 108)
    while c["SPLIT"] < 16 and programs * c["SPLIT"] * 2 <= fill and k >= c["SPLIT"] * 4 * c["BK"]:
        c["SPLIT"] *= 2
    return fitted(c, m, k)


def fitted(c: dict[str, Any], m: int, k: int) -> dict[str, Any]:
    """A configuration with tiles no larger than few rows or a short K need."""
    bm = max(16, pow2(m)) if m <= 64 else c["BM"]
    bk = max(16, min(c["BK"], pow2(k)))
    return {
        **c,
        "BM": bm,
        "BK": bk,
        "SPLIT": min(c["SPLIT"], cdiv(k, bk)),
        "AHEAD": min(c["AHEAD"], pow2(k) // 64 * 64),
    }


def tma_ready(x: Strided, weight: Strided, arch: int) -> bool:
    """Whether the copy engine can move both: sm_90, rows of a multiple of 16 bytes, 16-byte aligned bases."""
    size = 4 if x.dtype == "float32" else 2
    steps = (x.strides[0] * size, weight.strides[0] * size, x.offset * size, weight.offset * size)
    return arch >= 90 and all(step % 16 == 0 for step in steps)


@dataclass(frozen=True)
class Gemm:
    """``aten.linear`` of any number of rows."""

    name: str = "gemm"
    ops: tuple[str, ...] = ("aten.linear.default",)

    def select(self, site: CallSite) -> Selection | str:
        x, weight, bias, (out,) = site.values["input"], site.values["weight"], site.values["bias"], site.outputs
        n, k = weight.shape
        layout = rows_of(x)
        if layout is None:
            return "the rows are not evenly spaced"
        if not weight.contiguous or (bias is not None and not bias.contiguous):
            return "the weight is strided"
        m, stride = layout
        tuned = find_linear(site.tuning, self.name, weight.dtype, m, n, k)
        c = fitted(tuned[0], m, k) if tuned else shape_tiles(m, n, k, site.arch)
        tiles, split = cdiv(n, c["BN"]) * cdiv(m, c["BM"]), c["SPLIT"]
        flat = replace(x, shape=(m, k), strides=(stride, 1))
        tma = bool(c.get("TMA", 1)) and tma_ready(flat, weight, site.arch)
        tensors = {
            "x": TmaOperand(flat, (c["BM"], c["BK"])) if tma else flat,
            "weight": TmaOperand(weight, (c["BN"], c["BK"])) if tma else None,
            "w_ptr": weight if c["AHEAD"] or not tma else None, "bias": bias, "out": out,
            "partial": Scratch("partial", 4 * tiles * split * c["BM"] * c["BN"]) if split > 1 else None,
            "counter": Scratch("counter", 4 * tiles, zeroed=True) if split > 1 else None,
        }  # fmt: skip
        constants = {"M": m, "N": n, "K": k, "X_ROW": stride, "SWAP": bool(c["SWAP"]), "TMA": tma}
        constants |= {name: c[name] for name in ("BM", "BN", "BK", "SPLIT", "AHEAD")}
        moved = nbytes(weight, x, out)
        grid = (cdiv(n, c["BN"]), cdiv(m, c["BM"]), split)
        made = launch(
            site.arch, gemm, grid, tensors, constants, warps=c["warps"],
            stages=c["stages"], moved=moved, scratch={"partial": "*fp32", "counter": "*i32"},
        )  # fmt: skip
        cost = c.get("us") or max(modelled_us(moved, site.arch), 2 * m * n * k / FLOPS.get(site.arch, 0.2e9))
        why = f"{c['BM']}x{c['BN']}x{c['BK']} tiles" + (f", K in {split}" if split > 1 else "")
        return Selection((made,), why + (f", {tuned[1]}" if tuned else ""), cost)


KERNEL = Gemm()
