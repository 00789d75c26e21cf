"""Linear layer of many rows (prefill): programs stay on their multiprocessor and walk the tiles, fed by TMA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Selection, TmaOperand
from ..tuning import find_linear
from ._common import LAUNCH_US, SM_COUNT, cdiv, launch, nbytes, pdl_release, pdl_wait, rows_of
from .gemm import tma_ready

FLOPS = {90: 0.77e9, 100: 1.5e9}
"""Operations a microsecond of full tiles: 774 TFLOP/s measured on an H200 over the linears of an 8B model."""


@triton.jit
def gemm_persistent(
    x, weight, bias, out,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias through descriptors: boxes (BM, BK), (BN, BK), (BM, BN / PARTS).

    GROUP rows of tiles share weight tiles in L2. The store of a tile overlaps the next tile's loads; it goes in
    PARTS so that its shared memory leaves room for the load stages. Floor: 2·M·N·K operations.
    """
    TILES_M: tl.constexpr = (M + BM - 1) // BM
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    STEPS: tl.constexpr = (K + BK - 1) // BK
    SPAN: tl.constexpr = GROUP * TILES_N
    pdl_release(PDL)
    pdl_wait(PDL)
    for tile in tl.range(tl.program_id(0), TILES_M * TILES_N, PROGRAMS, flatten=True):
        first = tile // SPAN * GROUP
        height = tl.minimum(TILES_M - first, GROUP)
        m0 = (first + tile % SPAN % height) * BM
        n0 = tile % SPAN // height * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(STEPS):
            a = x.load([m0, step * BK])
            w = weight.load([n0, step * BK])
            acc = tl.dot(a, tl.trans(w), acc)
        if bias is not None:
            n = n0 + tl.arange(0, BN)
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if PARTS == 2:
            halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out.store([m0, n0], left.to(out.dtype))
            out.store([m0, n0 + BN // 2], right.to(out.dtype))
        else:
            out.store([m0, n0], acc.to(out.dtype))


def shape_tiles(m: int, n: int) -> dict[str, Any]:
    """Tile sizes for a shape nobody measured: wide tiles once they fill the GPU (705 to 776 TFLOP/s at 2048 rows)."""
    wide = cdiv(m, 128) * cdiv(n, 256) >= 100
    c = {"BM": 128, "BN": 256, "PARTS": 2, "stages": 3} if wide else {"BM": 128, "BN": 128, "PARTS": 1, "stages": 4}
    return {**c, "BK": 64, "GROUP": 8, "warps": 8}


@dataclass(frozen=True)
class PersistentGemm:
    """``aten.linear`` of more than 128 rows on sm_90 and later."""

    name: str = "gemm_persistent"
    ops: tuple[str, ...] = ("aten.linear.default",)

    def select(self, site: CallSite) -> Selection | str:
        x, weight, bias, (out,) = site.values["input"], site.values["weight"], site.values["bias"], site.outputs
        n, k = weight.shape
        layout = rows_of(x)
        if layout is None or not weight.contiguous or (bias is not None and not bias.contiguous):
            return "operands are strided"
        m, stride = layout
        flat, target = replace(x, shape=(m, k), strides=(stride, 1)), replace(out, shape=(m, n), strides=(n, 1))
        if m <= 64:
            return f"{m} rows do not fill a tile"
        if not tma_ready(flat, weight, site.arch) or not tma_ready(target, weight, site.arch):
            return "the copy engine cannot move the operands"
        tuned = find_linear(site.tuning, self.name, weight.dtype, m, n, k)
        c = tuned[0] if tuned else shape_tiles(m, n)
        tiles = cdiv(m, c["BM"]) * cdiv(n, c["BN"])
        programs = min(tiles, SM_COUNT.get(site.arch, 132))
        tensors = {
            "x": TmaOperand(flat, (c["BM"], c["BK"])), "weight": TmaOperand(weight, (c["BN"], c["BK"])),
            "bias": bias, "out": TmaOperand(target, (c["BM"], c["BN"] // c["PARTS"])),
        }  # fmt: skip
        constants = {"M": m, "N": n, "K": k, "PROGRAMS": programs}
        constants |= {name: c[name] for name in ("BM", "BN", "BK", "GROUP", "PARTS")}
        made = launch(
            site.arch, gemm_persistent, (programs,), tensors, constants, warps=c["warps"], stages=c["stages"],
            moved=nbytes(weight, x, out),
        )  # fmt: skip
        waves = cdiv(tiles, programs) * programs  # the last wave takes as long as a full one
        cost = c.get("us") or LAUNCH_US + 2 * waves * c["BM"] * c["BN"] * k / FLOPS.get(site.arch, 0.7e9)
        why = f"{c['BM']}x{c['BN']}x{c['BK']} tiles, {programs} programs" + (f", {tuned[1]}" if tuned else "")
        return Selection((made,), why, cost)


KERNEL = PersistentGemm()
