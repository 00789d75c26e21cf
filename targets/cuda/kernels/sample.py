"""Sampling on the device: penalties, bias and mask, then a draw with top-k, top-p and min-p that sorts nothing.

The semantics are those of llmopt.runtime.sampler: penalties, logit bias, grammar mask, temperature, top-k, top-p of
what top-k left, min-p; ties go to the lowest id; the draw inverts the cumulative distribution in order of token id;
randomness is Philox by (seed, position), so that a draw depends on nothing else.

Ops (not of the IR: the executor's sampling graph): ``llmopt.edit_logits``, ``llmopt.sample``, ``llmopt.record_token``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Selection
from ._common import cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait


@triton.jit
def edit_logits(
    logits, slots, history, repetition, presence, frequency, mask, out,
    V: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, V) fp32 = logits (M, V) with penalties and the grammar mask applied.

    history (S, V) int32 by sequence slot: twice the times a token was drawn, plus one if the prompt holds it;
    repetition, presence, frequency (M,) fp32; mask (M, WORDS) int32, bit set = allowed, or absent. Rows whose slot is
    negative are left alone. Floor: logits, history and out once.
    """
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        x = tl.load(logits + row * V + v, mask=v < V, other=0.0).to(tl.float32)
        if history is not None:
            seen = tl.load(history + slot * V + v, mask=v < V, other=0)
            times = (seen >> 1).to(tl.float32)
            r = tl.load(repetition + row)
            x = tl.where(seen > 0, tl.where(x > 0, x / r, x * r), x)
            x -= tl.load(frequency + row) * times + tl.where(times > 0, tl.load(presence + row), 0.0)
        if mask is not None:
            word = tl.load(mask + row * WORDS + v // 32, mask=v < V, other=0)
            x = tl.where(((word >> (v % 32)) & 1) != 0, x, float("-inf"))
        tl.store(out + row * V + v, x, mask=v < V)


@triton.jit
def add_bias(ids, values, slots, out, V: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (M, V) fp32 at ids (M, B) int32 gains values (M, B) fp32; ids are different in a row, -1 for none."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCK)
    pdl_release(PDL)
    pdl_wait(PDL)
    if tl.load(slots + row) >= 0:
        at = tl.load(ids + row * B + b, mask=b < B, other=-1)
        ok = (at >= 0) & (at < V)
        here = out + row * V + tl.where(ok, at, 0)
        tl.store(here, tl.load(here, mask=ok, other=0.0) + tl.load(values + row * B + b, mask=ok, other=0.0), mask=ok)


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
def heavier(x, top, inverse, low, step, V: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """How many entries (COUNT), or what weight, lie at or above each of the keys low + step, + 2 step, + 3 step."""
    a = tl.zeros((BLOCK,), tl.float64)
    b = tl.zeros((BLOCK,), tl.float64)
    c = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        value = tl.load(x + v, mask=v < V, other=float("-inf")).to(tl.float32)
        key = ordered(value).to(tl.int64)
        if COUNT:
            w = tl.where(v < V, 1.0, 0.0)
        else:
            w = tl.exp((value - top) * inverse)
        w = w.to(tl.float64)
        a += tl.where(key >= low + step, w, 0.0)
        b += tl.where(key >= low + 2 * step, w, 0.0)
        c += tl.where(key >= low + 3 * step, w, 0.0)
    return tl.sum(a), tl.sum(b), tl.sum(c)


@triton.jit
def threshold(x, top, inverse, low, wanted, V: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """The largest key at or above which lies at least ``wanted`` count or weight, at least ``low``; and how much lies
    strictly above it. Each pass over x (from L2) settles two bits of the key."""
    span = ordered(top).to(tl.int64) - low + 1
    step = tl.full((), 1, tl.int64) << 30
    beyond = tl.full((), 0.0, tl.float64)
    while step > 0:
        if step < span:
            a, b, c = heavier(x, top, inverse, low, step, V, BLOCK, COUNT)
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
def sample(
    logits, slots, temperature, top_k, top_p, min_p, seeds, positions, last, out,
    V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a row of logits (M, V): the largest at temperature 0, else a draw. One program a row.

    slots (M,) int32: a negative one draws nothing and gives -1; temperature and min_p (M,) fp32, top_p (M,) fp64,
    top_k (M,) int32 (min_p 0, top_p 1 and top_k 0 are off); seeds (M, 2) int32, low word first; positions (M,) int64;
    last (S,) int32 takes the token at the row's slot. A row that holds NaN or infinity, or allows nothing, gives -1 too. Floor: logits once; top-k and
    top-p read them 16 times each from L2.
    """
    row = tl.program_id(0).to(tl.int64)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row)
    token = -1
    if slot >= 0:
        x = logits + row * V
        lane = tl.arange(0, BLOCK)
        peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
        at = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, V, BLOCK):
            value = tl.load(x + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
            value = tl.where(value == value, value, float("inf"))
            at = tl.where(value > peaks, start + lane, at)
            peaks = tl.maximum(peaks, value)
        top = tl.max(peaks)
        if (top < float("inf")) & (top > float("-inf")):
            token = tl.min(tl.where(peaks == top, at, V))
            heat = tl.load(temperature + row)
            if heat > 0:
                token = draw(
                    x, top, 1 / heat, tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row),
                    philox_uniform(tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1), tl.load(positions + row)),
                    V, BLOCK,
                )  # fmt: skip
            tl.store(last + slot, token)
    tl.store(out + row, token)


@triton.jit
def draw(x, top, inverse, top_k, top_p, min_p, uniform, V: tl.constexpr, BLOCK: tl.constexpr):
    """A token of the kept entries, in proportion to exp((x - top) · inverse), in order of id."""
    lane = tl.arange(0, BLOCK)
    LEAST: tl.constexpr = -2139095040  # the key of the least finite number
    low = tl.full((), LEAST, tl.int64)  # kept: keys above ``low``, and the first ``ties`` at it
    ties = tl.full((), V, tl.int64)
    if (top_k > 0) & (top_k < V):
        low, above = threshold(x, top, inverse, low, top_k.to(tl.float64), V, BLOCK, True)
        ties = top_k.to(tl.int64) - above.to(tl.int64)
    if top_p < 1:
        total, lightest = kept_weight(x, top, inverse, low, ties, V, BLOCK)
        wanted = top_p.to(tl.float64) * total
        more, above = threshold(x, top, inverse, low, wanted, V, BLOCK, False)
        if more > low:
            ties = tl.full((), V, tl.int64)
            lightest = key_weight(more, top, inverse)
        elif above > wanted:
            above = wanted
        needed = tl.ceil((wanted - above) / tl.maximum(lightest, 1e-300)).to(tl.int64)
        ties = tl.minimum(ties, tl.maximum(needed, 1))
        low = more
    total = tl.full((), 0.0, tl.float64)
    passed = tl.full((), 0, tl.int64)
    for start in range(0, V, BLOCK):
        w, equal = kept(x, start + lane, top, inverse, min_p, low, ties, passed, V)
        total += tl.sum(w)
        passed += equal
    goal = uniform * total
    before = tl.full((), 0.0, tl.float64)
    passed = tl.full((), 0, tl.int64)
    token = tl.full((), -1, tl.int32)
    final = tl.full((), -1, tl.int32)
    for start in range(0, V, BLOCK):
        if token < 0:
            w, equal = kept(x, start + lane, top, inverse, min_p, low, ties, passed, V)
            running = before + tl.cumsum(w, 0)
            token_here = tl.min(tl.where((running > goal) & (w > 0), start + lane, V))
            token = tl.where(token_here < V, token_here, -1).to(tl.int32)
            final = tl.maximum(final, tl.max(tl.where(w > 0, start + lane, -1))).to(tl.int32)
            before += tl.sum(w)
            passed += equal
    return tl.where(token >= 0, token, final)


@triton.jit
def key_weight(key, top, inverse):
    """The weight of the number that a key stands for."""
    narrow = key.to(tl.int32)
    value = tl.where(narrow < 0, narrow ^ 0x7FFFFFFF, narrow).to(tl.float32, bitcast=True)
    return tl.exp((value - top) * inverse).to(tl.float64)


@triton.jit
def kept(x, v, top, inverse, min_p, low, ties, passed, V: tl.constexpr):
    """Weights (fp64) of a stretch's kept entries, and how many lie exactly at the threshold."""
    value = tl.load(x + v, mask=v < V, other=float("-inf")).to(tl.float32)
    key = ordered(value).to(tl.int64)
    equal = ((key == low) & (v < V)).to(tl.int64)
    rank = passed + tl.cumsum(equal, 0) - equal
    w = tl.exp((value - top) * inverse)
    keep = ((key > low) | ((equal > 0) & (rank < ties))) & (w >= min_p) & (value > float("-inf"))
    return tl.where(keep, w, 0.0).to(tl.float64), tl.sum(equal)


@triton.jit
def kept_weight(x, top, inverse, low, ties, V: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of all kept entries before top-p, and that of one at the threshold."""
    total = tl.full((), 0.0, tl.float64)
    passed = tl.full((), 0, tl.int64)
    for start in range(0, V, BLOCK):
        w, equal = kept(x, start + tl.arange(0, BLOCK), top, inverse, 0.0, low, ties, passed, V)
        total += tl.sum(w)
        passed += equal
    return total, key_weight(low, top, inverse)


@triton.jit
def record_token(tokens, slots, history, M: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """history (S, V) gains two at each row's token: the penalties of the next step see it without the host."""
    row = tl.arange(0, BLOCK)
    pdl_release(PDL)
    pdl_wait(PDL)
    slot = tl.load(slots + row, mask=row < M, other=-1)
    token = tl.load(tokens + row, mask=row < M, other=-1)
    ok = (slot >= 0) & (token >= 0)
    at = history + tl.where(ok, slot.to(tl.int64) * V + token, 0)
    tl.store(at, tl.load(at, mask=ok, other=0) + 2, mask=ok)


@dataclass(frozen=True)
class Sampling:
    """``llmopt.edit_logits``, ``llmopt.sample`` and ``llmopt.record_token``."""

    name: str = "sample"
    ops: tuple[str, ...] = ("llmopt.edit_logits", "llmopt.sample", "llmopt.record_token")

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        if site.call.op == "llmopt.record_token":
            rows = v["tokens"].shape[0]
            constants = {"M": rows, "V": v["history"].shape[1], "BLOCK": triton.next_power_of_2(rows)}
            return one(site, launch(site.arch, record_token, (1,), dict(v), constants, warps=1, moved=8 * rows))
        logits = v["logits"]
        if not logits.contiguous:
            return "the logits are strided"
        rows, vocabulary = logits.shape[-2:]
        if site.call.op == "llmopt.sample":
            constants = {"V": vocabulary, "BLOCK": min(8192, triton.next_power_of_2(vocabulary))}
            tensors = {**v, "out": site.outputs[0]}
            return one(site, launch(site.arch, sample, (rows,), tensors, constants, warps=16, moved=nbytes(logits)))
        (out,) = site.outputs
        names = ("logits", "slots", "history", "repetition", "presence", "frequency", "mask")
        words = 0 if v["mask"] is None else v["mask"].shape[1]
        made = [launch(
            site.arch, edit_logits, (rows, cdiv(vocabulary, 1024)), {**{n: v[n] for n in names}, "out": out},
            {"V": vocabulary, "WORDS": words, "BLOCK": 1024}, moved=nbytes(logits, out),
        )]  # fmt: skip
        if v["bias_ids"] is not None:
            width = v["bias_ids"].shape[1]
            tensors = {"ids": v["bias_ids"], "values": v["bias_values"], "slots": v["slots"], "out": out}
            constants = {"V": vocabulary, "B": width, "BLOCK": triton.next_power_of_2(width)}
            made.insert(1, launch(site.arch, add_bias, (rows,), tensors, constants, warps=1))
        moved = sum(x.bytes for x in made)
        return Selection(tuple(made), "one pass over the logits", modelled_us(moved, site.arch, len(made)))


def one(site: CallSite, made: Any) -> Selection:
    """The selection of one launch."""
    return Selection((made,), "one program a row", modelled_us(made.bytes, site.arch))


KERNEL = Sampling()
