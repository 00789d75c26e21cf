"""Sampling on the device: penalties, bias and mask, then a draw with top-k, top-p and min-p that sorts nothing.

The semantics are those of llmopt.runtime.sampler: penalties, logit bias, grammar mask, temperature, top-k, top-p of
what top-k left, min-p; ties go to the lowest id; the draw inverts the cumulative distribution in order of token id;
randomness is Philox by (seed, position), so that a draw depends on nothing else. Weights are fp32 exponentials
(relative error about 1e-6), sums fp64: a draw whose number falls that close to a boundary may differ from the host's.

Op (not of the IR: the executor's sampling graph): ``llmopt.sample``. Seven launches: edit, find levels by a sample,
count what lies above them, choose one, copy out what does, draw, report log-probabilities; rows that don't need one
leave it at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Scratch, Selection
from ._common import cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, pow2
from ._edit import INVERSE, LOGPROBS, MIN_P, RECORD, SEED, TEMPERATURE, TOP_K, TOP_P, counted, edit, number
from ._sift import LEVELS, census, choose, filtered, gauge, row_weight, sift, wide

STRETCH = 2048
"""Vocabulary entries a program: 63 programs a row at 128k, enough loads in flight for one row."""

SAMPLE = 4096
"""Entries of a row that say where the levels lie."""

LIST = 16384
"""Entries that may be kept before the draw reads the whole row instead."""

BLOCK = 4096
"""Entries that the draw reads at once."""

MOST_COUNTED = tl.constexpr(32765)
LEAST = tl.constexpr(-2139095040)
"""The key of the least finite number."""


@triton.jit
def ordered(x):
    """fp32 as int32 keys in the same order: the bits of a negative number, but its sign, turned over."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def philox_uniform(seed_low, seed_high, position):
    """The number in [0, 1) of llmopt.runtime.philox.uniforms, as fp64: ten rounds, 53 bits of words 0 and 1."""
    c0 = position.to(tl.uint32)
    c1, c2, c3 = c0 * 0, c0 * 0, c0 * 0
    k0, k1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        left = c0.to(tl.uint64) * 0xD2511F53
        right = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (right >> 32).to(tl.uint32) ^ c1 ^ k0, (left >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = right.to(tl.uint32), left.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    bits = (c0.to(tl.uint64) << 21) | (c1.to(tl.uint64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def reach(low, steps):
    """A key some way above another, at most the largest there is, which no number has."""
    return tl.minimum(low + steps, 2147483647).to(tl.int32)


@triton.jit
def heavier(x, n, top, inverse, low, step, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """How many of n entries (COUNT), or what weight, lie at or above the keys low + step, + 2 step, + 3 step."""
    kind: tl.constexpr = tl.int32 if COUNT else tl.float32
    a, b, c = tl.zeros((BLOCK,), kind), tl.zeros((BLOCK,), kind), tl.zeros((BLOCK,), kind)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < n, other=float("-inf"))
        key = ordered(value)
        w = tl.where(i < n, 1, 0) if COUNT else tl.exp((value - top) * inverse)
        a += tl.where(key >= reach(low, step), w, 0).to(kind)
        b += tl.where(key >= reach(low, 2 * step), w, 0).to(kind)
        c += tl.where(key >= reach(low, 3 * step), w, 0).to(kind)
    if COUNT:  # one reduction for all three: a row has less than 2^20 entries
        packed = tl.sum(a.to(tl.int64) | (b.to(tl.int64) << 20) | (c.to(tl.int64) << 40))
        found = (
            (packed & 0xFFFFF).to(tl.float64),
            ((packed >> 20) & 0xFFFFF).to(tl.float64),
            (packed >> 40).to(tl.float64),
        )
    else:
        found = tl.sum(a.to(tl.float64)), tl.sum(b.to(tl.float64)), tl.sum(c.to(tl.float64))
    return found


@triton.jit
def threshold(x, n, top, inverse, low, high, wanted, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """The largest key at or above which lies at least ``wanted`` count or weight, at least ``low`` and at most that of
    ``high``; and how much lies strictly above it. Each pass over x (n,) settles two bits of the key."""
    span = tl.maximum(ordered(high).to(tl.int64) - low + 1, 2)
    step = tl.full((), 1, tl.int64) << 30
    beyond = tl.full((), 0.0, tl.float64)
    while step > 0:
        if step < span:
            a, b, c = heavier(x, n, top, inverse, low, step, BLOCK, COUNT)
            if c >= wanted:
                low += 3 * step
            elif b >= wanted:
                low += 2 * step
                beyond = c
            elif a >= wanted:
                low += step
                beyond = b
            else:
                beyond = a
        step = step >> 2
    return low, beyond


@triton.jit
def key_weight(key, top, inverse):
    """The weight of the number that a key stands for."""
    narrow = key.to(tl.int32)
    value = tl.where(narrow < 0, narrow ^ 0x7FFFFFFF, narrow).to(tl.float32, bitcast=True)
    return tl.exp((value - top) * inverse).to(tl.float64)


@triton.jit
def kept(x, i, n, top, inverse, min_p, low, ties, passed):
    """Weights (fp64) of a stretch's kept entries, and how many lie exactly at the threshold."""
    value = tl.load(x + i, mask=i < n, other=float("-inf"))
    key = ordered(value)
    equal = ((key == low.to(tl.int32)) & (i < n)).to(tl.int32)
    rank = passed + tl.cumsum(equal, 0) - equal
    w = tl.exp((value - top) * inverse)
    keep = ((key > low.to(tl.int32)) | ((equal > 0) & (rank < ties))) & (w >= min_p) & (value > float("-inf"))
    return tl.where(keep, w, 0.0).to(tl.float64), tl.sum(equal)


@triton.jit
def kept_weight(x, n, top, inverse, min_p, low, ties, BLOCK: tl.constexpr):
    """Weight of all kept entries."""
    total = tl.full((), 0.0, tl.float64)
    passed = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        w, equal = kept(x, start + tl.arange(0, BLOCK), n, top, inverse, min_p, low, ties, passed)
        total += tl.sum(w)
        passed += equal
    return total


@triton.jit
def narrow_down(x, n, top, inverse, low, high, total, top_k, top_p, V: tl.constexpr, BLOCK: tl.constexpr):
    """What top-k and top-p keep of x (n,): keys above the ``low`` returned, and the first ``ties`` at it. The first of
    the two that is on reaches down to a key between ``low`` and that of ``high``. ``total``: weight of the whole row,
    of which top-p is a share unless top-k is on."""
    ties = tl.full((), V, tl.int64)
    if (top_k > 0) & (top_k < V):
        low, above = threshold(x, n, top, inverse, low, high, top_k.to(tl.float64), BLOCK, True)
        ties = top_k.to(tl.int64) - above.to(tl.int64)
        high = top
        if top_p < 1:
            total = kept_weight(x, n, top, inverse, 0.0, low, ties, BLOCK)
    if top_p < 1:
        wanted = top_p * total
        more, above = threshold(x, n, top, inverse, low, high, wanted, BLOCK, False)
        if more > low:
            ties = tl.full((), V, tl.int64)
        above = tl.minimum(above, wanted)
        needed = tl.ceil((wanted - above) / tl.maximum(key_weight(more, top, inverse), 1e-300))
        ties = tl.minimum(ties, tl.maximum(tl.minimum(needed, V), 1).to(tl.int64))
        low = more
    return low, ties


@triton.jit
def pick(x, n, top, inverse, min_p, low, ties, goal, BLOCK: tl.constexpr):
    """The first kept entry of x (n,) up to which more than ``goal`` of weight lies, else the last kept one."""
    before = tl.full((), 0.0, tl.float64)
    passed = tl.full((), 0, tl.int32)
    chosen = tl.full((), -1, tl.int32)
    final = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        if chosen < 0:
            i = start + tl.arange(0, BLOCK)
            w, equal = kept(x, i, n, top, inverse, min_p, low, ties, passed)
            first = tl.min(tl.where((before + tl.cumsum(w, 0) > goal) & (w > 0), i, 2147483647))
            chosen = tl.where(first < 2147483647, first, -1)
            final = tl.maximum(final, tl.max(tl.where(w > 0, i, -1)))
            before += tl.sum(w)
            passed += equal
    return tl.where(chosen >= 0, chosen, final)


@triton.jit
def draw(
    x, slots, records, positions, peaks, places, weights, raw_peaks, ids, found, bounds, history, last, out,
    V: tl.constexpr, PITCH: tl.constexpr, LIST: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M,) int32: a token for every row with a place, -1 where the logits are not finite, -2 where nothing is
    allowed; last (S,) int32 and history (S, V) int16 take it for the next step. positions (M,) int32: of the token.
    """
    row = tl.program_id(0).to(tl.int64)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    token = -1
    if slot >= 0:
        record = records + slot * RECORD
        p = tl.arange(0, PP)
        peak = tl.load(peaks + row * PARTS + p, mask=p < PARTS, other=float("-inf"))
        raw = tl.max(tl.load(raw_peaks + row * PARTS + p, mask=p < PARTS, other=float("-inf")))
        top = tl.max(peak)
        if (raw < float("inf")) & (raw > float("-inf")):
            if top == float("-inf"):
                token = -2
            else:
                place = tl.load(places + row * PARTS + p, mask=p < PARTS, other=V)
                token = tl.min(tl.where(peak == top, place, V))
                if number(record + TEMPERATURE) > 0:
                    shares = row_weight(peaks, weights, row, top, number(record + INVERSE), PARTS, PP)
                    token = draw_row(x + row * PITCH, shares, top, record, tl.load(positions + row), ids + row * LIST,
                                     found + row, bounds + 2 * row, V, PP, STRETCH, BLOCK)  # fmt: skip
                tl.store(last + slot, token)
                if counted(record):
                    seen = tl.load(history + slot * V + token)
                    tl.store(history + slot * V + token, tl.where(seen > MOST_COUNTED, seen, seen + 2))
    tl.store(out + row, token)


@triton.jit
def draw_row(
    x, shares, top, record, position, ids, found, bounds, V: tl.constexpr, PP: tl.constexpr, STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token in proportion to its weight. A row that keeps everything looks into one stretch only."""
    inverse, total = number(record + INVERSE), tl.sum(shares)
    uniform = philox_uniform(tl.load(record + SEED), tl.load(record + SEED + 1), position)
    low, ties = tl.full((), LEAST, tl.int64), tl.full((), V, tl.int64)
    min_p, first, n = 0.0, 0, V
    if filtered(record, V):
        listed = tl.load(found)
        min_p = number(record + MIN_P)
        if listed >= 0:
            first, n = V, listed
        low = tl.maximum(ordered(tl.load(bounds) + 0.0), low)
        low, ties = narrow_down(x + first, n, top, inverse, low, tl.load(bounds + 1), total, tl.load(record + TOP_K),
                                wide(record + TOP_P), V, BLOCK)  # fmt: skip
        goal = uniform * kept_weight(x + first, n, top, inverse, min_p, low, ties, BLOCK)
    else:
        p = tl.arange(0, PP)
        goal = uniform * total
        part = tl.sum((tl.cumsum(shares, 0) <= goal).to(tl.int32))
        part = tl.minimum(part, tl.max(tl.where(shares > 0, p, 0)))
        goal -= tl.sum(tl.where(p < part, shares, 0.0))
        first = part * STRETCH
        n = tl.minimum(V - first, STRETCH)
    token = first + pick(x + first, n, top, inverse, min_p, low, ties, goal, BLOCK)
    if token >= V:
        token = tl.load(ids + token - V)
    return token


@triton.jit
def report(
    logits, slots, records, raw_peaks, raw_places, raw_weights, tokens, reports,
    V: tl.constexpr, PARTS: tl.constexpr, PP: tl.constexpr, STRETCH: tl.constexpr, MOST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """reports (M, 1 + 2·MOST) int32 of rows that ask: log-probability of the token, ids of the largest logits, best
    first and lowest id among equals, then their log-probabilities (fp32 bits); all of the logits as they came."""
    row = tl.program_id(0).to(tl.int64)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    token = tl.load(tokens + row)
    count = tl.load(records + tl.maximum(slot, 0) * RECORD + LOGPROBS)
    if (slot >= 0) & (token >= 0) & (count >= 0):
        p, lane = tl.arange(0, PP), tl.arange(0, STRETCH)
        peak = tl.load(raw_peaks + row * PARTS + p, mask=p < PARTS, other=float("-inf"))
        place = tl.load(raw_places + row * PARTS + p, mask=p < PARTS, other=V)
        top = tl.max(peak)
        norm = tl.log(tl.sum(row_weight(raw_peaks, raw_weights, row, top, 1.0, PARTS, PP)).to(tl.float32))
        to = reports + row * (1 + 2 * MOST)
        chosen = tl.load(logits + row * V + token).to(tl.float32)
        tl.store(to, (chosen - top - norm).to(tl.int32, bitcast=True))
        for i in range(count):
            best = tl.max(peak)
            at = tl.min(tl.where(peak == best, place, V))
            tl.store(to + 1 + i, at)
            tl.store(to + 1 + MOST + i, (best - top - norm).to(tl.int32, bitcast=True))
            v = at // STRETCH * STRETCH + lane
            value = tl.load(logits + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
            after = (value < best) | ((value == best) & (v > at))
            value = tl.where(after, value, float("-inf"))
            next_peak = tl.max(value)
            here = p == at // STRETCH
            place = tl.where(here, tl.min(tl.where(after & (value == next_peak), v, V)), place)
            peak = tl.where(here, next_peak, peak)
    return


@dataclass(frozen=True)
class Sampling:
    """``llmopt.sample``."""

    name: str = "sample"
    ops: tuple[str, ...] = ("llmopt.sample",)

    def select(self, site: CallSite) -> Selection | str:
        """Seven launches over dense logits."""
        v: Any = site.values
        logits = v["logits"]
        if not logits.contiguous:
            return "the logits are strided"
        rows, vocabulary = logits.shape[-2:]
        if vocabulary >= 1 << 20:
            return f"a vocabulary of {vocabulary}: counts of less than 2^20 are packed"
        parts = cdiv(vocabulary, STRETCH)
        pitch, cell, tallies = -(-(vocabulary + LIST) // 4) * 4, rows * parts, rows * parts * LEVELS.value
        types = {
            "x": ("*fp32", rows * pitch), "ids": ("*i32", rows * LIST), "found": ("*i32", rows),
            "peaks": ("*fp32", cell), "places": ("*i32", cell), "weights": ("*fp64", cell),
            "raw_peaks": ("*fp32", cell), "raw_places": ("*i32", cell), "raw_weights": ("*fp64", cell),
            "bounds": ("*fp32", 2 * rows), "levels": ("*fp32", rows * LEVELS.value), "counts": ("*i32", tallies),
            "masses": ("*fp64", tallies), "starts": ("*i32", 2 * cell),
        }  # fmt: skip
        scratch = {n: Scratch(n, (8 if kind == "*fp64" else 4) * count) for n, (kind, count) in types.items()}
        tensors = {**scratch, **v, "tokens": v["out"], "reports": site.outputs[0]}
        constants = {
            "V": vocabulary, "PITCH": pitch, "WORDS": v["masks"].shape[1], "WIDTH": v["bias_ids"].shape[1],
            "PARTS": parts, "PP": pow2(parts), "STRETCH": STRETCH, "LIST": LIST, "BLOCK": BLOCK,
            "SAMPLE": SAMPLE,
            "MOST": (site.outputs[0].shape[1] - 1) // 2,
        }  # fmt: skip

        def made(function: Any, per_row: int, warps: int, moved: int = 0) -> Any:
            names = function.arg_names
            mine = {name: tensors[name] for name in names if name in tensors}
            own = {name: constants[name] for name in names if name in constants}
            kinds = {name: kind for name, (kind, _) in types.items()}
            return launch(site.arch, function, (rows, per_row), mine, own, warps=warps, moved=moved, scratch=kinds)

        launches = (
            made(edit, parts, 4, nbytes(logits) + 4 * rows * vocabulary),
            made(gauge, 1, 8),
            made(census, parts, 4),
            made(choose, 1, 4),
            made(sift, parts, 4),
            made(draw, 1, 16),
            made(report, 1, 4),
        )
        reason = "edited in one pass, drawn from what the filters can keep"
        return Selection(launches, reason, modelled_us(launches[0].bytes, site.arch, len(launches)))


KERNEL = Sampling()
