"""Linear layer of many rows (prefill): programs stay on their multiprocessor and walk the tiles, fed by TMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..fusion import LINEAR
from ..kernel import CallSite, Selection
from ..tuning import find_linear
from ._common import LAUNCH_US, SM_COUNT, cdiv, launch, pdl_release, pdl_wait
from ._linear import fit_stages, read_linear, real_rows, row_bounds, store_tile, tile_operands

FLOPS = {90: 0.77e9, 100: 1.5e9}
"""Operations a microsecond of full tiles: 774 TFLOP/s measured on an H200 over the linears of an 8B model."""


@triton.jit
def gemm_persistent(
    x, weight, bias, residual, out, bounds, last, M,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias through descriptors; see ``_linear`` for the gated and residual
    forms.

    GROUP rows of tiles share weight tiles in L2. The store of a tile overlaps the next tile's loads; it goes in
    PARTS so that its shared memory leaves room for the load stages. ``bounds``: see ``real_rows``.
    Floor: 2·M·N·K operations.
    """
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    STEPS: tl.constexpr = (K + BK - 1) // BK
    SPAN: tl.constexpr = GROUP * TILES_N
    tiles_m = (real_rows(bounds, last, M) + BM - 1) // BM
    pdl_release(PDL)
    pdl_wait(PDL)
    for tile in tl.range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0), flatten=True):
        first = tile // SPAN * GROUP
        height = tl.minimum(tiles_m - first, GROUP)
        m0 = (first + tile % SPAN % height) * BM
        n = tile % SPAN // height
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(STEPS):
            a = x.load([m0, step * BK])
            if KIND is not None:
                w = weight.load([0, n * (BN // 2), step * BK]).reshape(BN, BK)
            else:
                w = weight.load([n * BN, step * BK])
            acc = tl.dot(a, tl.trans(w), acc)
        n0 = n * (BN if KIND is None else BN // 2)
        store_tile(acc, bias, residual, out, m0, n0, N, KIND, BM, BN, PARTS)


def shape_tiles(m: int, n: int) -> dict[str, Any]:
    """Tile sizes for a shape nobody measured: wide tiles once they fill the GPU (705 to 776 TFLOP/s at 2048 rows)."""
    wide = cdiv(m, 128) * cdiv(n, 256) >= 100
    c = {"BM": 128, "BN": 256, "PARTS": 2, "stages": 3} if wide else {"BM": 128, "BN": 128, "PARTS": 1, "stages": 4}
    return {**c, "BK": 64, "GROUP": 8, "warps": 8}


@dataclass(frozen=True)
class PersistentGemm:
    """``aten.linear`` and ``cuda.linear`` (without its norm) of more than 64 rows on sm_90 and later."""

    name: str = "gemm_persistent"
    ops: tuple[str, ...] = ("aten.linear.default", LINEAR)

    def select(self, site: CallSite) -> Selection | str:
        linear = read_linear(site)
        if isinstance(linear, str):
            return linear
        m, n, k = linear.m, linear.n, linear.k
        if m <= 64:
            return f"{m} rows do not fill a tile"
        if not linear.movable(site.arch):
            return "the copy engine cannot move the operands"
        tuned = find_linear(site.tuning, self.name, linear.dtype, m, n, k, linear.form)
        c = fit_stages(tuned.config if tuned else shape_tiles(m, n), linear)
        tiles = cdiv(m, c["BM"]) * cdiv(n, c["BN"])
        programs = min(tiles, SM_COUNT.get(site.arch, 132))
        constants = {"N": n, "K": k, "KIND": linear.gate}
        constants |= {name: c[name] for name in ("BM", "BN", "BK", "GROUP", "PARTS")}
        made = launch(
            site.arch, gemm_persistent, (programs,), {**tile_operands(linear, c), **row_bounds(site, m), "M": m},
            constants, warps=c["warps"], stages=c["stages"], moved=linear.moved,
        )  # fmt: skip
        waves = cdiv(tiles, programs) * programs  # the last wave takes as long as a full one
        cost = LAUNCH_US + 2 * waves * c["BM"] * c["BN"] * k / FLOPS.get(site.arch, 0.7e9)
        why = f"{c['BM']}x{c['BN']}x{c['BK']} tiles, {programs} programs" + (f", {tuned.note}" if tuned else "")
        return Selection((made,), linear.joined + why, tuned.us if tuned else cost)


KERNEL = PersistentGemm()
