"""Linear layer of many rows on the tensor cores, tiles read through pointers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Scratch, Selection
from ._common import SM_COUNT, cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, pow2, rows_of

FLOPS = {80: 0.25e9, 89: 0.15e9, 90: 0.7e9, 100: 1.5e9}
"""Operations a microsecond: what a plain kernel reaches of the tensor cores."""


@triton.jit
def gemm(
    x, weight, bias, out, partial, counter,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, fp32 sums. Grid (N tiles, M tiles, SPLIT).

    With SPLIT > 1, each part of K leaves its sum in ``partial``; the last to come (``counter``, left zero) adds
    them in order, so that results do not depend on timing. ``SWAP`` computes the transposed tile, so that few rows
    become the narrow side of the tensor core's instruction, whose tall side has at least 64. Floor: max of 2·N·K
    bytes and 2·M·N·K operations.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    PART: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    first = tl.program_id(2) * PART
    nw = tl.where(n < N, n, 0).to(tl.int64)[:, None]
    mx = tl.where(m < M, m, 0).to(tl.int64)[:, None]
    k = tl.arange(0, BK)[None, :]
    pdl_release(PDL)
    pdl_wait(PDL)
    acc = tl.zeros((BN, BM), tl.float32) if SWAP else tl.zeros((BM, BN), tl.float32)
    for start in range(0, PART, BK):
        at = first + start + k
        if K % (SPLIT * BK) == 0:
            w = tl.load(weight + nw * K + at)
            a = tl.load(x + mx * X_ROW + at)
        else:
            w = tl.load(weight + nw * K + at, mask=at < K, other=0.0)
            a = tl.load(x + mx * X_ROW + at, mask=at < K, other=0.0)
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


def shape_tiles(m: int, n: int, k: int, arch: int) -> dict[str, int]:
    """Tile sizes, split and launch options for a shape nobody measured."""
    if m <= 64:
        bm, bn, bk = max(16, pow2(m)), 64, 128
        wanted = 2 * SM_COUNT.get(arch, 108)
        split = 1
        while split < 16 and cdiv(n, bn) * split * 2 <= wanted and k % (split * 2 * bk) == 0:
            split *= 2
        return {"BM": bm, "BN": bn, "BK": bk, "SPLIT": split, "warps": 4, "stages": 4 if arch >= 90 else 3, "SWAP": 1}
    if m <= 128 or arch < 90:
        return {"BM": 128, "BN": 64, "BK": 64, "SPLIT": 1, "warps": 4, "stages": 4, "SWAP": 0}
    return {"BM": 128, "BN": 128, "BK": 64, "SPLIT": 1, "warps": 8, "stages": 4, "SWAP": 0}


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
        tuned = site.tuning.get(self.name, {}).get(f"{weight.dtype} {m}x{n}x{k}")
        c: dict[str, Any] = dict(tuned or shape_tiles(m, n, k, site.arch))
        tiles, split = cdiv(n, c["BN"]) * cdiv(m, c["BM"]), c["SPLIT"]
        tensors = {
            "x": x, "weight": weight, "bias": bias, "out": out,
            "partial": Scratch("partial", 4 * tiles * split * c["BM"] * c["BN"]) if split > 1 else None,
            "counter": Scratch("counter", 4 * tiles, zeroed=True) if split > 1 else None,
        }  # fmt: skip
        constants = {"M": m, "N": n, "K": k, "X_ROW": stride, "SWAP": bool(c["SWAP"])}
        constants |= {name: c[name] for name in ("BM", "BN", "BK", "SPLIT")}
        moved = nbytes(weight, x, out)
        grid = (cdiv(n, c["BN"]), cdiv(m, c["BM"]), split)
        made = launch(
            site.arch, gemm, grid, tensors, constants, warps=c["warps"],
            stages=c["stages"], moved=moved, scratch={"partial": "*fp32", "counter": "*i32"},
        )  # fmt: skip
        cost = max(modelled_us(moved, site.arch), 2 * m * n * k / FLOPS.get(site.arch, 0.2e9))
        why = f"{c['BM']}x{c['BN']}x{c['BK']} tiles" + (f", K in {split}" if split > 1 else "")
        return Selection((made,), why + (", tuned" if tuned else ""), cost)


KERNEL = Gemm()
