"""``gemm_ring`` in Triton: what its Gluon form computes, for Triton's interpreter, which runs no Gluon."""

from __future__ import annotations

import triton
import triton.language as tl

from ._few_twin import store, values, weight_row


@triton.jit
def gemm_ring_twin(
    x, weight, groups, scales, bias, residual, out, partial, counter, M,
    N: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, FORM: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    G: tl.constexpr, STAGES: tl.constexpr, PROGRAMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, as ``gemm_ring`` says, a box at a time."""
    STEPS: tl.constexpr = (K + G * PARTS * WIDTH - 1) // (G * PARTS * WIDTH)
    UNITS: tl.constexpr = (N + BN - 1) // BN * STEPS
    me = tl.program_id(0)
    unit = me * UNITS // PROGRAMS
    end = (me + 1) * UNITS // PROGRAMS
    while unit < end:
        tile = unit // STEPS
        stop = tl.minimum(end, (tile + 1) * STEPS)
        acc = tl.zeros((BN, BM), tl.float32)
        for step in range((unit - tile * STEPS) * G, (stop - tile * STEPS) * G):
            box = rows_of(weight, tile, step * WIDTH, N, BN, GATE)
            found = tl.zeros((BN, BM), tl.float32)
            for part in tl.static_range(PARTS):
                a = x.load([0, (step * PARTS + part) * WIDTH])
                w = box if FORM is None else values(box, None, 0, FORM, part, a.dtype)
                found = tl.dot(w, tl.trans(a), found)
            if groups is not None:
                found *= scales_of(groups, tile, step, N, BN, GATE).to(tl.float32)[:, None]
            acc += found
        row = weight_row(tile, tl.arange(0, BN), N, BN, GATE)
        m = tl.arange(0, BM)
        if (unit == tile * STEPS) & (stop == (tile + 1) * STEPS):
            store(acc, scales, bias, residual, out, tile, row, m, M, N, K, BN, SHARED, GROUP, GATE)
        else:
            spot = partial + tl.arange(0, BN)[:, None] * BM + m[None, :]
            tl.store(spot + place_of(me, tile, STEPS, UNITS, PROGRAMS) * (BN * BM), acc)
            first = ((tile * STEPS + 1) * PROGRAMS - 1) // UNITS
            last = ((tile * STEPS + STEPS) * PROGRAMS - 1) // UNITS
            if tl.atomic_add(counter + tile, 1) == last - first:
                acc = tl.zeros((BN, BM), tl.float32)
                for program in range(first, last + 1):
                    acc += tl.load(spot + place_of(program, tile, STEPS, UNITS, PROGRAMS) * (BN * BM))
                store(acc, scales, bias, residual, out, tile, row, m, M, N, K, BN, SHARED, GROUP, GATE)
                tl.store(counter + tile, 0)
        unit = stop


@triton.jit
def place_of(program, tile, STEPS: tl.constexpr, UNITS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Where a program leaves its part of a tile."""
    return 2 * program + (program * UNITS // PROGRAMS <= tile * STEPS).to(tl.int32)


@triton.jit
def rows_of(weight, tile, column, N: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr):
    """A tile's rows of a box of the weight; with a gate, gates and then ups."""
    if GATE is None:
        box = weight.load([tile * BN, column])
    else:
        gates = weight.load([tile * (BN // 2), column])
        ups = weight.load([N // 2 + tile * (BN // 2), column])
        box = tl.reshape(tl.permute(tl.join(gates, ups), (2, 0, 1)), (BN, gates.shape[1]))
    return box


@triton.jit
def scales_of(groups, tile, step, N: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr):
    """Their scales in a group."""
    if GATE is None:
        line = tl.reshape(groups.load([step, tile * BN]), (BN,))
    else:
        gates = groups.load([step, tile * (BN // 2)])
        ups = groups.load([step, N // 2 + tile * (BN // 2)])
        line = tl.reshape(tl.permute(tl.join(gates, ups), (2, 0, 1)), (BN,))
    return line
