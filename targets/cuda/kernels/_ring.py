"""A linear layer's weights on their way through a ring of shared memory, which one warp fills and the others empty.

The copy engine brings boxes of weights, of x and of scales into a slot of the ring and tells a barrier; four warps wait
for it, multiply, and tell the slot's other barrier that it is free. All of a program's work is a range of units: a unit
is one slot's columns of one tile of the weight, and tiles follow each other without a pause.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from ._dequantize import bytes_of_halfwords, e4m3_of_halfwords, nibbles_of_halfwords
from ._gluon import barrier, copy
from .gemm_q_few import finish

FORMS = {
    type_: {
        "int4": tuple(nibbles_of_halfwords(part, type_).value for part in range(4)),
        "int8": tuple(bytes_of_halfwords(part, type_).value for part in range(2)),
        "fp8_e4m3": tuple(e4m3_of_halfwords(part, type_).value for part in range(2)),
    }
    for type_ in ("bf16", "fp16")
}
"""PTX from two halfwords to their codes number part as numbers."""


@gluon.constexpr_function
def ptx(form: str, part: int, type_: Any) -> Any:
    """PTX that turns halfwords into codes number ``part`` of the type."""
    return FORMS["bf16" if type_ == gl.bfloat16 else "fp16"][form][part]


@gluon.jit
def first_unit(program, UNITS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Where a program's share of the units begins: shares differ by one at most."""
    return program * UNITS // PROGRAMS


@gluon.jit
def fill(
    x, weight, groups, w_ring, x_ring, s_ring, full, free, begin, end,
    N: gl.constexpr, STEPS: gl.constexpr, GATE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr,
    PARTS: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp: the weights of as many units as there are slots before the wait for x, then x, then unit by unit."""
    for i in gl.static_range(STAGES):
        if begin + i < end:
            fill_weights(
                weight, groups, w_ring, s_ring, full.index(i), i, begin + i,
                N, STEPS, GATE, BM, BN, WIDTH, PARTS, G,
            )  # fmt: skip
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        if begin + i < end:
            fill_x(x, x_ring, full.index(i), i, begin + i, STEPS, WIDTH, PARTS, G)
    for unit in range(begin + STAGES, end):
        slot = (unit - begin) % STAGES
        mbarrier.wait(free.index(slot), ((unit - begin) // STAGES - 1) & 1)
        fill_weights(
            weight, groups, w_ring, s_ring, full.index(slot), slot, unit, N, STEPS, GATE, BM, BN, WIDTH, PARTS, G
        )
        fill_x(x, x_ring, full.index(slot), slot, unit, STEPS, WIDTH, PARTS, G)


@gluon.jit
def fill_x(
    x, x_ring, ready, slot, unit, STEPS: gl.constexpr, WIDTH: gl.constexpr, PARTS: gl.constexpr, G: gl.constexpr
):
    """The columns of x that meet a unit."""
    column = unit % STEPS * (G * PARTS * WIDTH)
    for i in gl.static_range(G * PARTS):
        copy(x, [0, column + i * WIDTH], ready, x_ring.index(slot * (G * PARTS) + i))


@gluon.jit
def fill_weights(
    weight, groups, w_ring, s_ring, ready, slot, unit, N: gl.constexpr, STEPS: gl.constexpr, GATE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr, PARTS: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """The weights of a unit, G boxes, and their scales; the barrier is told of the bytes of x too."""
    SCALES: gl.constexpr = 0 if groups is None else 2 * BN
    HALF: gl.constexpr = BN // 2
    mbarrier.expect(ready, G * (2 * BN * WIDTH + 2 * BM * PARTS * WIDTH + SCALES))
    tile = unit // STEPS
    for i in gl.static_range(G):
        step = unit % STEPS * G + i
        box = w_ring.index(slot * G + i)
        if GATE is None:
            copy(weight, [tile * BN, step * WIDTH], ready, box)
        else:
            copy(weight, [tile * HALF, step * WIDTH], ready, box.slice(0, HALF))
            copy(weight, [N // 2 + tile * HALF, step * WIDTH], ready, box.slice(HALF, HALF))
        if groups is not None:
            line = s_ring.index(slot * G + i)
            if GATE is None:
                copy(groups, [step, tile * BN], ready, line)
            else:
                copy(groups, [step, tile * HALF], ready, line.slice(0, HALF, dim=1))
                copy(groups, [step, N // 2 + tile * HALF], ready, line.slice(HALF, HALF, dim=1))


@gluon.jit
def empty(
    w_ring, x_ring, s_ring, full, free, scales, bias, residual, out, partial, counter, begin, end, M,
    N: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr,
    UNITS: gl.constexpr, GATE: gl.constexpr, FORM: gl.constexpr, SHARED: gl.constexpr, GROUP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, PARTS: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr, SCALED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps: the products of the program's units, and the result of each tile whose last unit they come to.

    A tile that several programs have units of is added up by the last of them to come, in the order of programs:
    results do not depend on timing."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    if PDL:
        gdc_wait()
    unit = begin
    while unit < end:
        tile = unit // STEPS
        stop = gl.minimum(end, (tile + 1) * STEPS)
        acc = gl.zeros((BN, BM), gl.float32, SUMS)
        for now in range(unit, stop):
            slot = (now - begin) % STAGES
            mbarrier.wait(full.index(slot), (now - begin) // STAGES & 1)
            acc = add_unit(acc, w_ring, x_ring, s_ring, slot, FORM, PARTS, G, SCALED)
            barrier()  # the slot is free when all four warps are done with it
            mbarrier.arrive(free.index(slot))
        if (unit == tile * STEPS) & (stop == (tile + 1) * STEPS):
            finish(acc, scales, bias, residual, out, tile, M, N, K, BN, BM, SHARED, GROUP, GATE)
        else:
            spot = gl.arange(0, BN, gl.SliceLayout(1, SUMS))[:, None] * BM
            spot += gl.arange(0, BM, gl.SliceLayout(0, SUMS))[None, :]
            place = part_of(gl.program_id(0), tile, STEPS, UNITS, PROGRAMS)
            gl.store(partial + place * (BN * BM) + spot, acc)
            first = owner(tile * STEPS, UNITS, PROGRAMS)
            last = owner(tile * STEPS + STEPS - 1, UNITS, PROGRAMS)
            barrier()
            if gl.atomic_add(counter + tile, 1, sem="acq_rel") == last - first:
                barrier()
                total = gl.zeros((BN, BM), gl.float32, SUMS)
                for program in range(first, last + 1):
                    place = part_of(program, tile, STEPS, UNITS, PROGRAMS)
                    total += gl.load(partial + place * (BN * BM) + spot, cache_modifier=".cg")
                finish(total, scales, bias, residual, out, tile, M, N, K, BN, BM, SHARED, GROUP, GATE)
                gl.store(counter + tile, 0)
        unit = stop


@gluon.jit
def owner(unit, UNITS: gl.constexpr, PROGRAMS: gl.constexpr):
    """The program whose share has the unit."""
    return ((unit + 1) * PROGRAMS - 1) // UNITS


@gluon.jit
def part_of(program, tile, STEPS: gl.constexpr, UNITS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Where a program leaves its part of a tile: it has two at most, of a tile begun before it and of one after it."""
    return (2 * program + (first_unit(program, UNITS, PROGRAMS) <= tile * STEPS).to(gl.int32)).to(gl.int64)


@gluon.jit
def add_unit(
    acc, w_ring, x_ring, s_ring, slot, FORM: gl.constexpr, PARTS: gl.constexpr, G: gl.constexpr, SCALED: gl.constexpr
):
    """acc (rows, M) and the products of a slot, where SCALED each box's scaled."""
    CODES: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    for i in gl.static_range(G):
        found = gl.zeros_like(acc) if SCALED else acc
        box = w_ring.index(slot * G + i)
        if FORM is None:
            found = warpgroup_mma(box, x_ring.index(slot * G + i).permute((1, 0)), found, is_async=True)
        else:
            codes = box.load(CODES)
            for part in gl.static_range(PARTS):
                columns = x_ring.index((slot * G + i) * PARTS + part).permute((1, 0))
                numbers = gl.inline_asm_elementwise(
                    ptx(FORM, part, x_ring.dtype), "=r,r", [codes], x_ring.dtype, True, 2
                )
                found = warpgroup_mma(numbers, columns, found, is_async=True)
        if SCALED:
            found = warpgroup_mma_wait(0, [found])
            scale = s_ring.index(slot * G + i).reshape([acc.shape[0]]).load(gl.SliceLayout(1, acc.type.layout))
            acc += found * scale.to(gl.float32)[:, None]
        else:
            acc = found
    if not SCALED:
        acc = warpgroup_mma_wait(0, [acc])
    return acc
