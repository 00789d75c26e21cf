"""Linear layer of codes by codes for many rows (prefill): programs walk the tiles, fed by TMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..eight_bits import ALL_COLUMNS, LINEAR_8
from ..kernel import CallSite, Selection
from ..tuning import find_linear, linear_form, quantized_form
from ._common import LAUNCH_US, SM_COUNT, cdiv, launch, pdl_release, pdl_wait
from ._eight_bits import Linear8, code_product, group_scales, grouped, read_linear_8, scale_columns, scale_rows
from ._linear import fit_stages, real_rows, row_bounds, store_tile, tile_operands

FLOPS = {90: 1.3e9, 100: 2.6e9}
"""Operations a microsecond of full tiles taken for the model: of an H200, 1407 were measured in 8192³ products of a
library; these kernels are not measured."""


@triton.jit
def gemm_w8a8_persistent(
    x, weight, x_scale, scales, bias, residual, out, bounds, last, M,
    N: tl.constexpr, K: tl.constexpr, STATIC: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, INT: tl.constexpr, INTERVAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, TALL: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = (x · weightᵀ) · scales + bias of codes x (M, K) and weight (N, K) through descriptors; operands as
    ``gemm_w8a8`` has them, tiles walked and stored as ``gemm_persistent`` does, TALL rows of tiles sharing weights.

    Floor: 2·M·N·K operations, at twice bfloat16's speed.
    """
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    STEPS: tl.constexpr = (K + BK - 1) // BK
    SPAN: tl.constexpr = TALL * TILES_N
    HALF: tl.constexpr = BN if KIND is None else BN // 2
    tiles_m = (real_rows(bounds, last, M) + BM - 1) // BM
    pdl_release(PDL)
    pdl_wait(PDL)
    for tile in tl.range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0), flatten=True):
        first = tile // SPAN * TALL
        height = tl.minimum(tiles_m - first, TALL)
        m0 = (first + tile % SPAN % height) * BM
        n = tile % SPAN // height
        m = m0 + tl.arange(0, BM)
        n0 = n * HALF
        rows = n0 + tl.arange(0, HALF)
        rows = tl.where(rows < (N if KIND is None else N // 2), rows, 0)
        acc = tl.zeros((BM, BN), tl.int32 if INT and GROUP == K else tl.float32)
        part = acc
        for step in range(STEPS):
            a = x.load([m0, step * BK])
            if KIND is not None:
                w = weight.load([0, n * (BN // 2), step * BK]).reshape(BN, BK)
            else:
                w = weight.load([n * BN, step * BK])
            s = 1.0
            if GROUP != K:
                s = group_scales(scales, step * BK, rows, n0, 0, N, K, SHARED, GROUP, HALF)
                if KIND is not None:
                    t = group_scales(scales, step * BK, rows, n0, N // 2, N, K, SHARED, GROUP, HALF)
                    s = tl.reshape(tl.permute(tl.join(s, t), (1, 0)), (BN,))
            if INTERVAL > BK and not INT and GROUP == K:
                part = code_product(part, w, a, s, True, False, BK, 0)
                if (step + 1) % (INTERVAL // BK) == 0:
                    acc += part
                    part = tl.zeros((BM, BN), tl.float32)
            else:
                acc = code_product(acc, w, a, s, GROUP == K, False, BK, INTERVAL)
        if INTERVAL > BK and not INT and GROUP == K:
            acc += part
        total = scale_rows(acc.to(tl.float32), x_scale, m, M, STATIC)
        if GROUP == K:
            column = n0 + tl.arange(0, BN) % HALF
            row = tl.where(column < (N if KIND is None else N // 2), column, 0) + tl.arange(0, BN) // HALF * (N // 2)
            total = scale_columns(total, scales + row // SHARED)
        store_tile(total, bias, residual, out, m0, n0, N, KIND, BM, BN, PARTS)


def shape_tiles(linear: Linear8) -> dict[str, Any]:
    """Tile sizes for a shape nobody measured. FP8 sums that leave the tensor cores on the way need twice the registers
    (see ``code_product``): 128 columns."""
    stay = linear.interval == ALL_COLUMNS or (linear.x.dtype == "int8" and linear.group >= linear.k)
    wide = stay and cdiv(linear.m, 128) * cdiv(linear.n, 256) >= 100
    c = {"BM": 128, "BN": 256, "PARTS": 2, "stages": 3} if wide else {"BM": 128, "BN": 128, "PARTS": 1, "stages": 4}
    return {**c, "BK": 128, "TALL": 8, "warps": 8}


@dataclass(frozen=True)
class PersistentGemmW8A8:
    """``cuda.linear_8`` of more than 64 rows on sm_90 and later."""

    name: str = "gemm_w8a8_persistent"
    ops: tuple[str, ...] = (LINEAR_8,)

    def select(self, site: CallSite) -> Selection | str:
        linear = read_linear_8(site)
        if isinstance(linear, str):
            return linear
        m, n, k = linear.m, linear.n, linear.k
        if m <= 64:
            return f"{m} rows do not fill a tile"
        if not linear.movable(site.arch):
            return "the copy engine cannot move the operands"
        if linear.group < k and linear.shared < 128:
            return "a scale for each row and group would spill registers"
        key = quantized_form(site.values, k)
        tuned = find_linear(site.tuning, self.name, key, m, n, k, linear_form(site.values))
        c = tuned.config if tuned else shape_tiles(linear)
        c = fit_stages({**c, "BK": grouped(c["BK"], linear)}, linear)
        tiles = cdiv(m, c["BM"]) * cdiv(n, c["BN"])
        programs = min(tiles, SM_COUNT.get(site.arch, 132))
        constants = {**linear.constants, **{name: c[name] for name in ("BM", "BN", "BK", "TALL", "PARTS")}}
        operands = {**tile_operands(linear, c), "x_scale": linear.x_scale, "scales": linear.scales}
        made = launch(
            site.arch, gemm_w8a8_persistent, (programs,), {**operands, **row_bounds(site, m), "M": m}, constants,
            warps=c["warps"], stages=c["stages"], moved=linear.moved,
        )  # fmt: skip
        waves = cdiv(tiles, programs) * programs
        cost = LAUNCH_US + 2 * waves * c["BM"] * c["BN"] * k / FLOPS.get(site.arch, 1.2e9)
        why = f"{linear.scheme}, {c['BM']}x{c['BN']}x{c['BK']} tiles, {programs} programs"
        why += f", {tuned.note}" if tuned else ", modelled"
        return Selection((made,), linear.joined + why, tuned.us if tuned else cost)


KERNEL = PersistentGemmW8A8()
