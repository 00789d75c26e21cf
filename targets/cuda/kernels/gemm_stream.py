"""Linear layer of 65 to some thousand rows: every program walks the same number of K steps, whatever the tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..fusion import LINEAR
from ..kernel import CallSite, Scratch, Selection
from ..tuning import find_linear
from ._common import (
    INTERPRETED,
    LAUNCH_US,
    SM_COUNT,
    cdiv,
    launch,
    modelled_us,
    pdl_release,
    pdl_wait,
    prefetch,
)
from ._linear import fit_stages, read_linear, real_rows, row_bounds, store_tile, tile_operands

FLOPS = {90: 0.72e9, 100: 1.4e9}
"""Operations a microsecond of programs that share the work evenly."""


@triton.jit
def gemm_stream(
    x, weight, w_ptr, bias, residual, out, partial, flag, bounds, last, M,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias; see ``_linear`` for the gated and residual forms.

    All K steps of all tiles make one sequence, of which each program has an even share: there is no last wave that
    leaves processors idle. A program goes backwards. Its first tile may end in the next program's share: it leaves
    that sum in ``partial`` and raises its ``flag``. Its last tile may begin in the shares before: their sums are
    added in order, so that results do not depend on timing, and their flags lowered. Programs start in order and leave
    their sums before they wait, so waiting ends even where not all fit on the GPU.
    The first AHEAD columns of the first tile's weights go to L2 before the wait for x.
    ``bounds``: see ``real_rows``. Floor: max of 2·N·K bytes and 2·M·N·K operations.
    """
    STEPS: tl.constexpr = (K + BK - 1) // BK
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    tiles_m = (real_rows(bounds, last, M) + BM - 1) // BM
    total = tiles_m * TILES_N * STEPS
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    begin = program * total // programs
    end = (program + 1) * total // programs
    WIDTH: tl.constexpr = BN if KIND is None else BN // 2
    if AHEAD > 0:
        step = end - 1
        row = step // STEPS // tiles_m * BN + tl.arange(0, BN)
        if KIND is not None:
            row = step // STEPS // tiles_m * WIDTH + tl.arange(0, BN) % WIDTH
            row += tl.arange(0, BN) // WIDTH * (N // 2)
        line = (step % STEPS + 1) * BK - AHEAD + tl.arange(0, AHEAD // 64) * 64
        ok = (row < N)[:, None] & ((line >= 0) & (line < K))[None, :]
        prefetch(w_ptr + row[:, None].to(tl.int64) * K + line[None, :], ok, PDL)
    pdl_release(PDL)
    pdl_wait(PDL)
    acc = tl.zeros((BM, BN), tl.float32)
    k = (end - 1) % STEPS
    m = (end - 1) // STEPS % tiles_m
    n = (end - 1) // STEPS // tiles_m
    last_left = tl.where(end % STEPS == 0, -1, tl.maximum(begin, (end - 1) // STEPS * STEPS))
    for step in range(end - 1, begin - 1, -1):
        a = x.load([m * BM, k * BK])
        if KIND is not None:
            w = weight.load([0, n * WIDTH, k * BK]).reshape(BN, BK)
        else:
            w = weight.load([n * WIDTH, k * BK])
        acc = tl.dot(a, tl.trans(w), acc)
        if (k == 0) | (step == last_left):
            if step == last_left:
                leave(partial + program * (BM * BN), acc, BM, BN)
                raise_flag(flag + program)
            else:
                store_tile(acc, bias, residual, out, m * BM, n * WIDTH, N, KIND, BM, BN, PARTS)
            acc = tl.zeros((BM, BN), tl.float32)
        k -= 1  # counters, because divisions would be on every step's way
        m = tl.where(k < 0, m - 1, m)
        k = tl.where(k < 0, STEPS - 1, k)
        n = tl.where(m < 0, n - 1, n)
        m = tl.where(m < 0, tiles_m - 1, m)
    if (begin % STEPS != 0) & (begin != last_left):
        tile = begin // STEPS
        before = ((tile * STEPS + 1) * programs - 1) // total  # the program that has the tile's first step
        spot = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        for other in range(program - 1, before - 1, -1):
            await_flag(flag + other)
            acc += tl.load(partial + other * (BM * BN) + spot, cache_modifier=".cg")
            tl.debug_barrier()
            tl.store(flag + other, 0)
        store_tile(acc, bias, residual, out, tile % tiles_m * BM, tile // tiles_m * WIDTH, N, KIND, BM, BN, PARTS)


@triton.jit
def leave(at, acc, BM: tl.constexpr, BN: tl.constexpr):
    """A tile's sums to memory straight from the registers of the tensor core's layout, which holds pairs of columns:
    a plain store would first turn the tile over in shared memory that the load stages need."""
    spot = at + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    if INTERPRETED:
        tl.store(spot, acc)
    else:
        tl.inline_asm_elementwise(
            "st.global.cg.v2.f32 [$2], {$4, $5}; mov.u32 $0, 0; mov.u32 $1, 0;", "=r,=r,l,l,f,f", [spot, acc],
            tl.int32, False, 2,
        )  # fmt: skip


@triton.jit
def raise_flag(at):
    """Let another program see what this one's threads have written. In assembly, because Triton does not pipeline a
    loop that holds a barrier or an atomic."""
    if INTERPRETED:
        tl.store(at, 1)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .u32 thread; bar.sync 0; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0; "
            "@first st.release.gpu.global.u32 [$1], 1; mov.u32 $0, 0; }", "=r,l", [at], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def await_flag(at):
    """Wait until another program has raised its flag; what it wrote before is then visible."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; again: ld.acquire.gpu.global.b32 $0, [$1]; setp.eq.u32 p, $0, 0; @p bra again; }", "=r,l",
            [at], tl.int32, False, 1,
        )  # fmt: skip


def shape_tiles(m: int, n: int) -> dict[str, Any]:
    """Tile sizes for a shape nobody measured."""
    c = {"BK": 64, "AHEAD": 256, "warps": 8}
    if m <= 128 or n < 16384:
        return {**c, "BM": 128, "BN": 128, "PARTS": 1, "stages": 6}
    return {**c, "BM": 256, "BN": 128, "PARTS": 2, "stages": 4}


@dataclass(frozen=True)
class StreamGemm:
    """``aten.linear`` and ``cuda.linear`` (without its norm) of more than 64 rows on sm_90 and later."""

    name: str = "gemm_stream"
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
        steps = tiles * cdiv(k, c["BK"])
        programs = min(SM_COUNT.get(site.arch, 132), max(steps // 4, 1))
        tensors = {
            **tile_operands(linear, c), **row_bounds(site, m), "w_ptr": linear.weight if c["AHEAD"] else None, "M": m,
            "partial": Scratch("partial", 4 * programs * c["BM"] * c["BN"]),
            "flag": Scratch("flag", 4 * programs, zeroed=True),
        }  # fmt: skip
        constants = {"N": n, "K": k, "KIND": linear.gate}
        constants |= {name: c[name] for name in ("BM", "BN", "BK", "PARTS", "AHEAD")}
        made = launch(
            site.arch, gemm_stream, (programs,), tensors, constants, warps=c["warps"], stages=c["stages"],
            moved=linear.moved, scratch={"partial": "*fp32", "flag": "*i32"},
        )  # fmt: skip
        work = 2 * cdiv(m, c["BM"]) * c["BM"] * n * k / FLOPS.get(site.arch, 0.7e9)
        cost = tuned.us if tuned else LAUNCH_US + max(modelled_us(linear.moved, site.arch, 0), work) + 4
        why = f"{c['BM']}x{c['BN']}x{c['BK']} tiles shared evenly by {programs} programs"
        return Selection((made,), linear.joined + why + (f", {tuned.note}" if tuned else ""), cost)


KERNEL = StreamGemm()
