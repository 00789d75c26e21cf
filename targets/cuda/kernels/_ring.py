"""Codes of a linear on their way through a ring in shared memory, which one warp fills and four others empty (Gluon).

The copy engine brings a chunk of a tile's codes, the columns of x that meet it and its scales into a slot of the ring
and tells the slot's first barrier; the four warps wait for that, multiply, and tell its second that the slot is free.
All of a program's work is a range of units: a unit is one chunk of one tile, and tiles follow each other without a
pause.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from ._dequantize import HALFWORDS
from ._gluon import barrier, copy
from .gemm_q_few import finish


@gluon.constexpr_function
def ptx(form: str, part: int, type_: Any) -> Any:
    """PTX that turns halfwords into codes number ``part`` of the type."""
    return HALFWORDS["bf16" if type_ == gl.bfloat16 else "fp16"][form][part]


@gluon.jit
def first_unit(program, UNITS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Where a program's share of the units begins: shares differ by one at most."""
    return program * UNITS // PROGRAMS


@gluon.jit
def owner(unit, UNITS: gl.constexpr, PROGRAMS: gl.constexpr):
    """The program whose share has the unit."""
    return ((unit + 1) * PROGRAMS - 1) // UNITS


@gluon.jit
def part_of(program, tile, CHUNKS: gl.constexpr, UNITS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Where a program leaves its part of a tile: it has two at most, of a tile begun before it and of one after it."""
    return (2 * program + (first_unit(program, UNITS, PROGRAMS) <= tile * CHUNKS).to(gl.int32)).to(gl.int64)


@gluon.jit
def fill(
    x, codes, groups, c_ring, x_ring, s_ring, full, free, begin, end,
    N: gl.constexpr, CHUNKS: gl.constexpr, GATE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp: the codes of as many units as there are slots before the wait for x, then x, then unit by unit."""
    for i in gl.static_range(STAGES):
        if begin + i < end:
            fill_codes(
                codes, groups, c_ring, s_ring, full.index(i), i, begin + i, N, CHUNKS, GATE, BM, BN, WIDTH, PARTS
            )
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        if begin + i < end:
            fill_x(x, x_ring, full.index(i), i, begin + i, CHUNKS, WIDTH, PARTS)
    for unit in range(begin + STAGES, end):
        slot = (unit - begin) % STAGES
        mbarrier.wait(free.index(slot), ((unit - begin) // STAGES - 1) & 1)
        fill_codes(codes, groups, c_ring, s_ring, full.index(slot), slot, unit, N, CHUNKS, GATE, BM, BN, WIDTH, PARTS)
        fill_x(x, x_ring, full.index(slot), slot, unit, CHUNKS, WIDTH, PARTS)


@gluon.jit
def fill_x(x, x_ring, ready, slot, unit, CHUNKS: gl.constexpr, WIDTH: gl.constexpr, PARTS: gl.constexpr):
    """The columns of x that meet a unit, each part's in a box of its own."""
    for part in gl.static_range(PARTS):
        copy(x, [0, (unit % CHUNKS * PARTS + part) * WIDTH], ready, x_ring.index(slot * PARTS + part))


@gluon.jit
def fill_codes(
    codes, groups, c_ring, s_ring, ready, slot, unit, N: gl.constexpr, CHUNKS: gl.constexpr, GATE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The codes of a unit and their scales; the barrier is told of the bytes of x too."""
    SCALES: gl.constexpr = 0 if groups is None else BN
    HALF: gl.constexpr = BN // 2
    mbarrier.expect(ready, 2 * (BN * WIDTH + BM * PARTS * WIDTH + SCALES))
    tile = unit // CHUNKS
    chunk = unit % CHUNKS
    box = c_ring.index(slot)
    if GATE is None:
        copy(codes, [tile * BN, chunk * WIDTH], ready, box)
    else:
        copy(codes, [tile * HALF, chunk * WIDTH], ready, box.slice(0, HALF))
        copy(codes, [N // 2 + tile * HALF, chunk * WIDTH], ready, box.slice(HALF, HALF))
    if groups is not None:
        line = s_ring.index(slot)
        if GATE is None:
            copy(groups, [chunk, tile * BN], ready, line)
        else:
            copy(groups, [chunk, tile * HALF], ready, line.slice(0, HALF, dim=1))
            copy(groups, [chunk, N // 2 + tile * HALF], ready, line.slice(HALF, HALF, dim=1))


@gluon.jit
def empty(
    c_ring, x_ring, s_ring, full, free, scales, bias, residual, out, partial, counter, begin, end, M,
    N: gl.constexpr, K: gl.constexpr, CHUNKS: gl.constexpr, UNITS: gl.constexpr, GATE: gl.constexpr,
    FORM: gl.constexpr, SHARED: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps: the products of the program's units, and the result of each tile whose last part they bring.

    A tile that several programs have units of is added up by the last of them to come, in the order of programs:
    results do not depend on timing."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    if PDL:
        gdc_wait()
    unit = begin
    while unit < end:
        tile = unit // CHUNKS
        stop = gl.minimum(end, (tile + 1) * CHUNKS)
        acc = gl.zeros((BN, BM), gl.float32, SUMS)
        for now in range(unit, stop):
            slot = (now - begin) % STAGES
            mbarrier.wait(full.index(slot), (now - begin) // STAGES & 1)
            acc = add_unit(acc, c_ring, x_ring, s_ring, slot, K, GROUP, FORM, PARTS)
            barrier()  # the slot is free when all four warps are done with it
            mbarrier.arrive(free.index(slot))
        if (unit == tile * CHUNKS) & (stop == (tile + 1) * CHUNKS):
            finish(acc, scales, bias, residual, out, tile, M, N, K, BN, BM, SHARED, GROUP, GATE)
        else:
            spot = gl.arange(0, BN, gl.SliceLayout(1, SUMS))[:, None] * BM
            spot += gl.arange(0, BM, gl.SliceLayout(0, SUMS))[None, :]
            place = part_of(gl.program_id(0), tile, CHUNKS, UNITS, PROGRAMS)
            gl.store(partial + place * (BN * BM) + spot, acc)
            first = owner(tile * CHUNKS, UNITS, PROGRAMS)
            last = owner(tile * CHUNKS + CHUNKS - 1, UNITS, PROGRAMS)
            barrier()
            if gl.atomic_add(counter + tile, 1, sem="acq_rel") == last - first:
                barrier()
                total = gl.zeros((BN, BM), gl.float32, SUMS)
                for program in range(first, last + 1):
                    place = part_of(program, tile, CHUNKS, UNITS, PROGRAMS)
                    total += gl.load(partial + place * (BN * BM) + spot, cache_modifier=".cg")
                finish(total, scales, bias, residual, out, tile, M, N, K, BN, BM, SHARED, GROUP, GATE)
                gl.store(counter + tile, 0)
        unit = stop


@gluon.jit
def add_unit(
    acc, c_ring, x_ring, s_ring, slot, K: gl.constexpr, GROUP: gl.constexpr, FORM: gl.constexpr, PARTS: gl.constexpr
):
    """acc (rows, M) and the products of a slot, scaled if scales are of groups."""
    codes = c_ring.index(slot).load(gl.DotOperandLayout(0, acc.type.layout, 2))
    found = acc if GROUP == K else gl.zeros_like(acc)
    for part in gl.static_range(PARTS):
        numbers = gl.inline_asm_elementwise(ptx(FORM, part, x_ring.dtype), "=r,r", [codes], x_ring.dtype, True, 2)
        columns = x_ring.index(slot * PARTS + part).permute((1, 0))
        found = warpgroup_mma(numbers, columns, found, is_async=True)
    found = warpgroup_mma_wait(0, [found])
    if GROUP != K:
        scale = s_ring.index(slot).reshape([acc.shape[0]]).load(gl.SliceLayout(1, acc.type.layout))
        found = acc + found * scale.to(gl.float32)[:, None]
    return found
