"""Second part of sampling: the few entries that top-k, top-p or min-p can keep, found without sorting.

Sixteen levels below the largest entry are counted and weighed in one pass over the row, and sixteen more between the
two of them that matter; the highest level that loses nothing wanted decides, and what lies above it is copied out in
order of id. When that is more than LIST entries (a flat distribution with top-p), the draw reads the whole row instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import pdl_release, pdl_wait
from ._edit import INVERSE, MIN_P, RECORD, TEMPERATURE, TOP_K, TOP_P, number

LEVELS = tl.constexpr(16)


@triton.jit
def wide(words):
    """The fp64 in two words of a record."""
    low = tl.load(words).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (low | (high << 32)).to(tl.float64, bitcast=True)


@triton.jit
def filtered(record, V: tl.constexpr):
    """Whether a sequence draws from a part of the vocabulary only."""
    top_k = tl.load(record + TOP_K)
    some = ((top_k > 0) & (top_k < V)) | (wide(record + TOP_P) < 1) | (number(record + MIN_P) > 0)
    return some & (number(record + TEMPERATURE) > 0)


@triton.jit
def row_peak(peaks, row, PARTS: tl.constexpr, PP: tl.constexpr):
    """Largest entry of a row."""
    p = tl.arange(0, PP)
    return tl.max(tl.load(peaks + row * PARTS + p, mask=p < PARTS, other=float("-inf")))


@triton.jit
def row_weight(peaks, weights, row, top, inverse, PARTS: tl.constexpr, PP: tl.constexpr):
    """Weight of each stretch of a row (PP,) fp64, relative to the row's largest entry."""
    p = tl.arange(0, PP)
    peak = tl.load(peaks + row * PARTS + p, mask=p < PARTS, other=float("-inf"))
    weight = tl.load(weights + row * PARTS + p, mask=p < PARTS, other=0.0)
    return tl.where(peak > float("-inf"), weight * tl.exp((peak - top) * inverse).to(tl.float64), 0.0)


@triton.jit
def tally(
    x, chunk, level, levels, counts, masses, top, inverse, V: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr
):
    """Entries of a chunk at or above each level (LEVELS,), and their weight; x, counts and masses are the row's."""
    count = tl.zeros((LEVELS, LANES), tl.int32)
    mass = tl.zeros((LEVELS, LANES), tl.float32)
    for start in range(0, CHUNK, LANES):
        v = chunk * CHUNK + start + tl.arange(0, LANES)
        value = tl.load(x + v, mask=v < V, other=float("-inf"))
        above = (value[None, :] >= level[:, None]) & (value > float("-inf"))[None, :]
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp((value - top) * inverse)[None, :], 0.0)
    n = tl.arange(0, LEVELS)
    if chunk == 0:
        tl.store(levels + n, level)
    tl.store(counts + chunk * LEVELS + n, tl.sum(count, 1))
    tl.store(masses + chunk * LEVELS + n, tl.sum(mass.to(tl.float64), 1))


@triton.jit
def census(
    x, slots, records, peaks, levels, counts, masses,
    V: tl.constexpr, PITCH: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """levels (M, LEVELS) fp32, 0.25 to 14 nats below the largest entry, the last one below everything; counts int32
    and masses fp64 (M, CHUNKS, LEVELS): entries of a chunk at or above each of them, and their weight."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    record = records + tl.maximum(slot, 0) * RECORD
    if (slot >= 0) & filtered(record, V):
        top = row_peak(peaks, row, PARTS, PP)
        n = tl.arange(0, LEVELS)
        depth = 0.25 * tl.exp2(0.42 * n.to(tl.float32)) * number(record + TEMPERATURE)
        level = tl.where(n < LEVELS - 1, top - depth, float("-inf"))
        at = row * CHUNKS * LEVELS
        tally(x + row * PITCH, chunk, level, levels + row * LEVELS, counts + at, masses + at, top,
              number(record + INVERSE), V, CHUNK, LANES)  # fmt: skip


@triton.jit
def sums(counts, masses, row, CHUNKS: tl.constexpr, CP: tl.constexpr):
    """A row's counts by chunk (CP, LEVELS), and its masses (LEVELS,)."""
    c, n = tl.arange(0, CP), tl.arange(0, LEVELS)
    cell = (row * CHUNKS + c[:, None]) * LEVELS + n[None, :]
    mass = tl.load(masses + cell, mask=(c < CHUNKS)[:, None], other=0.0)
    return tl.load(counts + cell, mask=(c < CHUNKS)[:, None], other=0), tl.sum(mass, 0)


@triton.jit
def highest(record, count, mass, level, top, total, V: tl.constexpr):
    """The first level that keeps all that is wanted. With top-k the share of top-p is one of what top-k keeps, which
    only the draw knows."""
    top_k, top_p, min_p = tl.load(record + TOP_K), wide(record + TOP_P), number(record + MIN_P)
    by_k = (top_k > 0) & (top_k < V)
    enough = by_k & (count >= top_k)
    enough |= (by_k == 0) & (top_p < 1) & (mass >= top_p * total * 1.000001)
    light = tl.exp((level - top) * number(record + INVERSE)) < min_p * 0.99999
    enough |= ((by_k == 0) | (top_p >= 1)) & light
    n = tl.arange(0, LEVELS)
    return tl.min(tl.where(enough, n, LEVELS - 1))


@triton.jit
def refine(
    x, slots, records, peaks, weights, levels, counts, masses, fine_levels, fine_counts, fine_masses,
    V: tl.constexpr, PITCH: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, CHUNKS: tl.constexpr,
    CP: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A census of levels between the one that ``highest`` chose and the one above it."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    record = records + tl.maximum(slot, 0) * RECORD
    if (slot >= 0) & filtered(record, V):
        top, inverse = row_peak(peaks, row, PARTS, PP), number(record + INVERSE)
        n = tl.arange(0, LEVELS)
        count, mass = sums(counts, masses, row, CHUNKS, CP)
        total = tl.sum(row_weight(peaks, weights, row, top, inverse, PARTS, PP))
        level = tl.load(levels + row * LEVELS + n)
        chosen = highest(record, tl.sum(count, 0), mass, level, top, total, V)
        low = tl.load(levels + row * LEVELS + chosen)
        high = tl.load(levels + row * LEVELS + tl.maximum(chosen - 1, 0))
        high = tl.where(chosen > 0, high, top)
        step = tl.where(low > float("-inf"), (high - low) * 0.0625, 2 * number(record + TEMPERATURE))
        level = tl.where(n < LEVELS - 1, high - step * (n + 1).to(tl.float32), low)
        at = row * CHUNKS * LEVELS
        tally(x + row * PITCH, chunk, level, fine_levels + row * LEVELS, fine_counts + at, fine_masses + at, top,
              inverse, V, CHUNK, LANES)  # fmt: skip


@triton.jit
def sift(
    x, slots, records, peaks, weights, fine_levels, fine_counts, fine_masses, ids, found, bounds,
    V: tl.constexpr, PITCH: tl.constexpr, LIST: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr,
    CHUNKS: tl.constexpr, CP: tl.constexpr, CHUNK: tl.constexpr, STRETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copies what may be kept behind the row, x[row, V:], and its ids to ids (M, LIST). found (M,) int32: how many,
    or -1 when they are more than LIST; bounds (M, 2) fp32: what may be kept is at least the first, and what is kept
    because of its count or weight reaches no further down than the second."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    record = records + tl.maximum(slot, 0) * RECORD
    if (slot >= 0) & filtered(record, V):
        top, inverse = row_peak(peaks, row, PARTS, PP), number(record + INVERSE)
        c, n = tl.arange(0, CP), tl.arange(0, LEVELS)
        count, mass = sums(fine_counts, fine_masses, row, CHUNKS, CP)
        total = tl.sum(row_weight(peaks, weights, row, top, inverse, PARTS, PP))
        level = tl.load(fine_levels + row * LEVELS + n)
        chosen = highest(record, tl.sum(count, 0), mass, level, top, total, V)
        lengths = tl.sum(tl.where(n[None, :] == chosen, count, 0), 1)
        all_of_them = tl.sum(lengths)
        low = tl.load(fine_levels + row * LEVELS + chosen)
        if chunk == 0:
            above = tl.load(fine_levels + row * LEVELS + tl.maximum(chosen - 1, 0))
            tl.store(found + row, tl.where(all_of_them <= LIST, all_of_them, -1))
            tl.store(bounds + 2 * row, low)
            tl.store(bounds + 2 * row + 1, tl.where(chosen > 0, above, top))
        mine = tl.sum(tl.where(c == chunk, lengths, 0))
        if (all_of_them <= LIST) & (mine > 0):
            at = tl.sum(tl.where(c < chunk, lengths, 0))
            for start in range(0, CHUNK, STRETCH):
                v = chunk * CHUNK + start + tl.arange(0, STRETCH)
                value = tl.load(x + row * PITCH + v, mask=v < V, other=float("-inf"))
                above = (value >= low) & (value > float("-inf"))
                to = at + tl.cumsum(above.to(tl.int32), 0) - 1
                tl.store(x + row * PITCH + V + to, value, mask=above)
                tl.store(ids + row * LIST + to, v, mask=above)
                at += tl.sum(above.to(tl.int32))
