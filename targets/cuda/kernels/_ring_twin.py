"""``gemm_q_ring`` in Triton: what its Gluon form computes, for Triton's interpreter, which runs no Gluon."""

from __future__ import annotations

import triton
import triton.language as tl

from ._few_twin import store, values, weight_row


@triton.jit
def gemm_q_ring_twin(
    x, codes, groups, scales, bias, residual, out, partial, counter, M,
    N: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, FORM: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, PROGRAMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, as ``gemm_q_ring`` says, a chunk at a time."""
    CHUNKS: tl.constexpr = K // (PARTS * WIDTH)
    UNITS: tl.constexpr = (N + BN - 1) // BN * CHUNKS
    me = tl.program_id(0)
    unit = me * UNITS // PROGRAMS
    end = (me + 1) * UNITS // PROGRAMS
    while unit < end:
        tile = unit // CHUNKS
        stop = tl.minimum(end, (tile + 1) * CHUNKS)
        acc = tl.zeros((BN, BM), tl.float32)
        for chunk in range(unit - tile * CHUNKS, stop - tile * CHUNKS):
            halves = rows_of(codes, tile, chunk * WIDTH, N, BN, GATE)
            found = tl.zeros((BN, BM), tl.float32)
            for part in tl.static_range(PARTS):
                a = x.load([0, (chunk * PARTS + part) * WIDTH])
                found = tl.dot(values(halves, None, 0, FORM, part, a.dtype), tl.trans(a), found)
            if groups is not None:
                found *= scales_of(groups, tile, chunk, N, BN, GATE).to(tl.float32)[:, None]
            acc += found
        row = weight_row(tile, tl.arange(0, BN), N, BN, GATE)
        m = tl.arange(0, BM)
        if (unit == tile * CHUNKS) & (stop == (tile + 1) * CHUNKS):
            store(acc, scales, bias, residual, out, tile, row, m, M, N, K, BN, SHARED, GROUP, GATE)
        else:
            spot = partial + tl.arange(0, BN)[:, None] * BM + m[None, :]
            tl.store(spot + place_of(me, tile, CHUNKS, UNITS, PROGRAMS) * (BN * BM), acc)
            first = ((tile * CHUNKS + 1) * PROGRAMS - 1) // UNITS
            last = ((tile * CHUNKS + CHUNKS) * PROGRAMS - 1) // UNITS
            if tl.atomic_add(counter + tile, 1) == last - first:
                acc = tl.zeros((BN, BM), tl.float32)
                for program in range(first, last + 1):
                    acc += tl.load(spot + place_of(program, tile, CHUNKS, UNITS, PROGRAMS) * (BN * BM))
                store(acc, scales, bias, residual, out, tile, row, m, M, N, K, BN, SHARED, GROUP, GATE)
                tl.store(counter + tile, 0)
        unit = stop


@triton.jit
def place_of(program, tile, CHUNKS: tl.constexpr, UNITS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Where a program leaves its part of a tile."""
    return 2 * program + (program * UNITS // PROGRAMS <= tile * CHUNKS).to(tl.int32)


@triton.jit
def rows_of(codes, tile, column, N: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr):
    """A tile's rows of a chunk's codes; with a gate, gates and then ups."""
    if GATE is None:
        box = codes.load([tile * BN, column])
    else:
        gates = codes.load([tile * (BN // 2), column])
        ups = codes.load([N // 2 + tile * (BN // 2), column])
        box = tl.reshape(tl.permute(tl.join(gates, ups), (2, 0, 1)), (BN, gates.shape[1]))
    return box


@triton.jit
def scales_of(groups, tile, chunk, N: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr):
    """Their scales."""
    if GATE is None:
        line = tl.reshape(groups.load([chunk, tile * BN]), (BN,))
    else:
        gates = groups.load([chunk, tile * (BN // 2)])
        ups = groups.load([chunk, N // 2 + tile * (BN // 2)])
        line = tl.reshape(tl.permute(tl.join(gates, ups), (2, 0, 1)), (BN,))
    return line
