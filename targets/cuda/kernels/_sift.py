"""Second part of sampling: the few entries that top-k, top-p or min-p can keep, found without sorting.

A sample of the row tells at which level some hundred, some thousand entries lie above; what does is counted and weighed
exactly, the highest level that loses nothing wanted decides, and what lies above it is copied out in order of id. When
that is more than LIST entries (a flat distribution with top-p), the draw reads the whole row instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import pdl_release, pdl_wait
from ._edit import INVERSE, MIN_P, RECORD, TEMPERATURE, TOP_K, TOP_P, number

LEVELS = tl.constexpr(8)
USED = tl.constexpr(5)
"""Levels in use: three by rank, that of min-p, and the one below everything."""


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
def gauge(
    x, slots, records, peaks, levels,
    V: tl.constexpr, PITCH: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, SAMPLE: tl.constexpr,
    LIST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """levels (M, LEVELS) fp32: above the first three lie about LIST / 16, LIST / 4 and 3/4 LIST entries (as a sample
    of SAMPLE entries has it), above the fourth what min-p keeps, above the fifth everything."""
    row = tl.program_id(0).to(tl.int64)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    record = records + tl.maximum(slot, 0) * RECORD
    if (slot >= 0) & filtered(record, V):
        top = row_peak(peaks, row, PARTS, PP)
        size: tl.constexpr = V if V < SAMPLE else SAMPLE
        i = tl.arange(0, SAMPLE)
        at = i if V < SAMPLE else (i.to(tl.int64) * V // SAMPLE).to(tl.int32)
        value = tl.load(x + row * PITCH + at, mask=i < size, other=float("-inf"))
        finite = value > float("-inf")
        count = tl.sum(finite.to(tl.int32))
        mean = tl.sum(tl.where(finite, value, 0.0)) / tl.maximum(count, 1).to(tl.float32)
        width = tl.maximum(top - mean, 1e-20) * 0.00390625
        bins = tl.minimum((top - tl.maximum(value, mean)) / width, 255.0).to(tl.int32)
        total = tl.cumsum(tl.histogram(bins, 256), 0)
        n = tl.arange(0, LEVELS)
        rank = tl.where(n == 0, LIST // 16, tl.where(n == 1, LIST // 4, LIST * 3 // 4)) * size // V
        bin = tl.sum((total[:, None] < rank[None, :]).to(tl.int32), 0)
        level = tl.where((n < 3) & (bin < 255), top - (bin + 1).to(tl.float32) * width, float("-inf"))
        least = top + (tl.log(number(record + MIN_P)) - 0.0001) * number(record + TEMPERATURE)
        level = tl.where(n == 3, least, level)  # log(0) is below everything, too
        tl.store(levels + row * LEVELS + n, level)


@triton.jit
def census(
    x, slots, records, peaks, levels, counts, masses,
    V: tl.constexpr, PITCH: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, STRETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """counts int32 and masses fp64 (M, PARTS, LEVELS): a stretch's entries at or above each level, their weight."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = part * STRETCH + tl.arange(0, STRETCH)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    record = records + tl.maximum(slot, 0) * RECORD
    if (slot >= 0) & filtered(record, V):
        top = row_peak(peaks, row, PARTS, PP)
        value = tl.load(x + row * PITCH + v, mask=v < V, other=float("-inf"))
        weight = tl.exp((value - top) * number(record + INVERSE))
        to = (row * PARTS + part) * LEVELS
        for level in tl.static_range(USED):
            above = (value >= tl.load(levels + row * LEVELS + level)) & (value > float("-inf"))
            tl.store(counts + to + level, tl.sum(above.to(tl.int32)))
            tl.store(masses + to + level, tl.sum(tl.where(above, weight, 0.0)).to(tl.float64))


@triton.jit
def highest(record, count, mass, level, top, total, V: tl.constexpr):
    """The highest level that keeps all that is wanted, and the next one above it, which does not. With top-k the share
    of top-p is one of what top-k keeps, which only the draw knows."""
    top_k, top_p, min_p = tl.load(record + TOP_K), wide(record + TOP_P), number(record + MIN_P)
    by_k = (top_k > 0) & (top_k < V)
    enough = by_k & (count >= top_k)
    enough |= (by_k == 0) & (top_p < 1) & (mass >= top_p * total * 1.000001)
    light = tl.exp((level - top) * number(record + INVERSE)) < min_p * 0.99999
    enough |= ((by_k == 0) | (top_p >= 1)) & light
    low = tl.max(tl.where(enough, level, float("-inf")))
    return low, tl.min(tl.where((enough == 0) & (level > low), level, top))


@triton.jit
def choose(
    slots, records, peaks, weights, levels, counts, masses, found, bounds, starts,
    V: tl.constexpr, LIST: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """found (M,) int32: how many entries may be kept, or -1 when they are more than LIST; bounds (M, 2) fp32: they are
    at least the first, and what is kept for its count or weight reaches down at least to the second; starts
    (M, PARTS, 2) int32: where each stretch's part of the list begins and ends."""
    row = tl.program_id(0).to(tl.int64)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    record = records + tl.maximum(slot, 0) * RECORD
    if (slot >= 0) & filtered(record, V):
        top, inverse = row_peak(peaks, row, PARTS, PP), number(record + INVERSE)
        p, n = tl.arange(0, PP), tl.arange(0, LEVELS)
        cell = (row * PARTS + p[:, None]) * LEVELS + n[None, :]
        there = (p < PARTS)[:, None] & (n < USED)[None, :]
        count = tl.load(counts + cell, mask=there, other=0)
        mass = tl.sum(tl.load(masses + cell, mask=there, other=0.0), 0)
        total = tl.sum(row_weight(peaks, weights, row, top, inverse, PARTS, PP))
        level = tl.load(levels + row * LEVELS + n)
        low, high = highest(record, tl.sum(count, 0), mass, level, top, total, V)
        first = tl.min(tl.where((level == low) & (n < USED), n, LEVELS))
        lengths = tl.sum(tl.where(n[None, :] == first, count, 0), 1)
        length = tl.sum(lengths)
        tl.store(found + row, tl.where(length <= LIST, length, -1))
        tl.store(bounds + 2 * row, low)
        tl.store(bounds + 2 * row + 1, high)
        ends = tl.cumsum(lengths, 0)
        at = starts + (row * PARTS + p) * 2
        tl.store(at, ends - lengths, mask=p < PARTS)
        tl.store(at + 1, ends, mask=p < PARTS)


@triton.jit
def sift(
    x, slots, records, found, bounds, starts, ids,
    V: tl.constexpr, PITCH: tl.constexpr, LIST: tl.constexpr, PARTS: tl.constexpr, STRETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Copies what may be kept behind the row, x[row, V:], and its ids to ids (M, LIST)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    record = records + tl.maximum(slot, 0) * RECORD
    if (slot >= 0) & filtered(record, V):
        at = tl.load(starts + (row * PARTS + part) * 2)
        end = tl.load(starts + (row * PARTS + part) * 2 + 1)
        if (tl.load(found + row) >= 0) & (end > at):
            v = part * STRETCH + tl.arange(0, STRETCH)
            value = tl.load(x + row * PITCH + v, mask=v < V, other=float("-inf"))
            above = (value >= tl.load(bounds + 2 * row)) & (value > float("-inf"))
            to = at + tl.cumsum(above.to(tl.int32), 0) - 1
            tl.store(x + row * PITCH + V + to, value, mask=above)
            tl.store(ids + row * LIST + to, v, mask=above)
