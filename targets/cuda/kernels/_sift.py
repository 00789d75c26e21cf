"""Second part of sampling: the few entries that top-k, top-p or min-p can keep, found without sorting.

Sixteen cuts below the largest entry are counted and weighed in one pass; the highest cut that loses nothing wanted
decides, and what lies above it is copied out in order of id. When that is more than LIST entries (a flat distribution
with top-p), the draw reads the whole row instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import pdl_release, pdl_wait
from ._edit import INVERSE, MIN_P, RECORD, TEMPERATURE, TOP_K, TOP_P, number

CUTS = tl.constexpr(16)


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
def depth(cut):
    """How far below the largest entry a cut lies, in nats: 0.25 to 14; the last one keeps everything."""
    return tl.where(cut < 15, 0.25 * tl.exp2(0.42 * cut), float("inf"))


@triton.jit
def row_peak(peaks, row, PARTS: tl.constexpr, PP: tl.constexpr):
    """Largest entry of a row."""
    p = tl.arange(0, PP)
    return tl.max(tl.load(peaks + row * PARTS + p, mask=p < PARTS, other=float("-inf")))


@triton.jit
def census(
    x, slots, records, peaks, levels, counts, masses,
    V: tl.constexpr, PITCH: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, STRETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """levels (M, CUTS) fp32: where each cut lies; counts int32 and masses fp64 (M, PARTS, CUTS): entries of a stretch
    at or above each of them, and their weight."""
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
        heat = number(record + TEMPERATURE)
        cell = (row * PARTS + part) * CUTS
        for cut in tl.static_range(CUTS):
            level = top - depth(tl.full((), cut, tl.float32)) * heat
            if part == 0:
                tl.store(levels + row * CUTS + cut, level)
            above = (value >= level) & (value > float("-inf"))
            tl.store(counts + cell + cut, tl.sum(above.to(tl.int32)))
            tl.store(masses + cell + cut, tl.sum(tl.where(above, weight, 0.0).to(tl.float64)))


@triton.jit
def row_weight(peaks, weights, row, top, inverse, PARTS: tl.constexpr, PP: tl.constexpr):
    """Weight of each stretch of a row (PP,) fp64, relative to the row's largest entry."""
    p = tl.arange(0, PP)
    peak = tl.load(peaks + row * PARTS + p, mask=p < PARTS, other=float("-inf"))
    weight = tl.load(weights + row * PARTS + p, mask=p < PARTS, other=0.0)
    return tl.where(peak > float("-inf"), weight * tl.exp((peak - top) * inverse).to(tl.float64), 0.0)


@triton.jit
def sift(
    x, slots, records, peaks, weights, levels, counts, masses, ids, found,
    V: tl.constexpr, PITCH: tl.constexpr, LIST: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr,
    STRETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copies what may be kept behind the row, x[row, V:], and its ids to ids (M, LIST); found (M,) int32: how many,
    or -1 when they are more than LIST."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = part * STRETCH + tl.arange(0, STRETCH)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    record = records + tl.maximum(slot, 0) * RECORD
    if (slot >= 0) & filtered(record, V):
        top = row_peak(peaks, row, PARTS, PP)
        inverse, top_p = number(record + INVERSE), wide(record + TOP_P)
        p, cuts = tl.arange(0, PP), tl.arange(0, CUTS)
        cell = (row * PARTS + p[:, None]) * CUTS + cuts[None, :]
        table = tl.load(counts + cell, mask=(p < PARTS)[:, None], other=0)
        mass = tl.sum(tl.load(masses + cell, mask=(p < PARTS)[:, None], other=0.0), 0)
        cut = highest_cut(
            tl.sum(table, 0), mass, tl.sum(row_weight(peaks, weights, row, top, inverse, PARTS, PP)),
            tl.load(record + TOP_K), top_p, number(record + MIN_P), V,
        )  # fmt: skip
        lengths = tl.sum(tl.where(cuts[None, :] == cut, table, 0), 1)
        total = tl.sum(lengths)
        fits = total <= LIST
        if part == 0:
            tl.store(found + row, tl.where(fits, total, -1))
        if fits:
            value = tl.load(x + row * PITCH + v, mask=v < V, other=float("-inf"))
            above = (value >= tl.load(levels + row * CUTS + cut)) & (value > float("-inf"))
            at = tl.sum(tl.where(p < part, lengths, 0)) + tl.cumsum(above.to(tl.int32), 0) - 1
            tl.store(x + row * PITCH + V + at, value, mask=above)
            tl.store(ids + row * LIST + at, v, mask=above)


@triton.jit
def highest_cut(counts, masses, total, top_k, top_p, min_p, V: tl.constexpr):
    """The first cut that keeps all that is wanted. With top-k the share of top-p is one of what top-k keeps, which
    only the draw knows."""
    cuts = tl.arange(0, CUTS)
    by_k = (top_k > 0) & (top_k < V)
    enough = by_k & (counts >= top_k)
    enough |= (by_k == 0) & (top_p < 1) & (masses >= top_p * total * 1.000001)
    light = tl.exp(-depth(cuts.to(tl.float32))) < min_p * 0.99999
    enough |= ((by_k == 0) | (top_p >= 1)) & light
    return tl.min(tl.where(enough, cuts, CUTS - 1))
