"""First part of sampling: penalties, logit bias and mask, and what each stretch of the vocabulary then holds.

Every sequence place has a record of RECORD words (llmopt.launch.SAMPLING_RECORD says what lies where), a row of
counts and a list of biases, all written when its sequence is admitted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import pdl_release, pdl_wait

RECORD = tl.constexpr(16)
TEMPERATURE, INVERSE, MIN_P, TOP_K = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
REPETITION, PRESENCE, FREQUENCY = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
LOGPROBS, BIASES, SEED, TOP_P = tl.constexpr(7), tl.constexpr(8), tl.constexpr(10), tl.constexpr(12)


@triton.jit
def number(word):
    """The fp32 in a record's word."""
    return tl.load(word).to(tl.float32, bitcast=True)


@triton.jit
def counted(record):
    """Whether a sequence has penalties, so that its row of counts is kept."""
    return (number(record + REPETITION) != 1) | (number(record + PRESENCE) != 0) | (number(record + FREQUENCY) != 0)


@triton.jit
def summary(x, v, inverse, V: tl.constexpr):
    """Largest entry, the lowest id that has it, and the weight of all entries, exp((x - largest) · inverse)."""
    peak = tl.max(x)
    base = tl.where(peak > float("-inf"), peak, 0.0)
    return peak, tl.min(tl.where(x == peak, v, V)), tl.sum(tl.exp((x - base) * inverse)).to(tl.float64)


@triton.jit
def edit(
    logits, slots, records, history, bias_ids, bias_values, mask_rows, masks,
    x, peaks, places, weights, raw_peaks, raw_places, raw_weights,
    V: tl.constexpr, PITCH: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    STRETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (M, PITCH) fp32 = logits (M, V) with penalties, bias and mask applied; summaries (M, PARTS) of both.

    slots, mask_rows (M,) int32: a row's place and its row of masks (·, WORDS) int32, below zero for none; history
    (S, V) int16: twice the times a token was drawn, plus one if the prompt holds it; bias_ids (S, WIDTH) int32 all
    different, bias_values fp32. A NaN counts as infinity. Floor: logits, x, and counts and mask where used.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = part * STRETCH + tl.arange(0, STRETCH)
    inside = v < V
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        record = records + slot * RECORD
        value = tl.load(logits + row * V + v, mask=inside, other=float("-inf")).to(tl.float32)
        value = tl.where(value == value, value + 0.0, float("inf"))  # -0.0 becomes 0.0: they are equal
        cell = row * PARTS + part
        tl.store(raw_peaks + cell, tl.max(value))
        if tl.load(record + LOGPROBS) >= 0:
            peak, place, weight = summary(value, v, 1.0, V)
            tl.store(raw_places + cell, place)
            tl.store(raw_weights + cell, weight)
        if counted(record):
            seen = tl.load(history + slot * V + v, mask=inside, other=0).to(tl.int32)
            times = (seen >> 1).to(tl.float32)
            r = tl.zeros((STRETCH,), tl.float32) + number(record + REPETITION)
            value = tl.where(seen > 0, tl.where(value > 0, tl.div_rn(value, r), value * r), value)
            value -= number(record + FREQUENCY) * times + tl.where(times > 0, number(record + PRESENCE), 0.0)
        count = tl.load(record + BIASES)
        if count > 0:
            value = biased(value, x + row * PITCH, v, part * STRETCH, bias_ids + slot * WIDTH,
                           bias_values + slot * WIDTH, count, V, STRETCH)  # fmt: skip
        masked = tl.load(mask_rows + row).to(tl.int64)
        if masked >= 0:
            word = tl.load(masks + masked * WORDS + v // 32, mask=inside, other=0)
            value = tl.where(((word >> (v % 32)) & 1) != 0, value, float("-inf"))
        tl.store(x + row * PITCH + v, value, mask=inside)
        peak, place, weight = summary(value, v, number(record + INVERSE), V)
        tl.store(peaks + cell, peak)
        tl.store(places + cell, place)
        tl.store(weights + cell, weight)


@triton.jit
def biased(value, x, v, first, ids, values, count, V: tl.constexpr, STRETCH: tl.constexpr):
    """A stretch with the biases of its ids added, by way of memory: registers can't be indexed."""
    tl.store(x + v, value, mask=v < V)
    tl.debug_barrier()
    for start in range(0, count, 128):
        b = start + tl.arange(0, 128)
        at = tl.load(ids + b, mask=b < count, other=-1)
        here = (at >= first) & (at < first + STRETCH)
        spot = x + tl.where(here, at, 0)
        added = tl.load(spot, mask=here, other=0.0) + tl.load(values + b, mask=here, other=0.0)
        tl.store(spot, added, mask=here)
    tl.debug_barrier()
    return tl.load(x + v, mask=v < V, other=float("-inf"))
