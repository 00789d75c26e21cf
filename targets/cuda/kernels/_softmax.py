"""Device functions of attention: key tiles into running sums, sums of several parts into one, and their storing."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, peek, tanh
from ._dequantize import numbers
from ._states import decode


@triton.jit
def walk(
    acc, mass, peak, query, k_state, v_state, key_scale, k_map, v_map, pages, head, begin, end, kept, skipped, position,
    length, top,
    HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr, scale: tl.constexpr, window: tl.constexpr,
    softcap: tl.constexpr, sink_tokens: tl.constexpr, RING: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Key tiles ``begin`` to ``end`` into the running sums; MASKED where some line does not see some key."""
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    for block in range(begin, end):
        start = tl.where(block < kept, block, block + skipped) * BN
        slot = start + tl.arange(0, BN)
        live = slot < top
        if k_map is not None:
            at = (peek(pages + start // S) * HK + head) * S + start % S
            keys = decode(k_map.load([at, 0]), query.dtype)
            values = decode(v_map.load([at, 0]), query.dtype)
            if MASKED:  # what lies past the sequence may be NaN, which a zero weight does not silence
                values = tl.where(live[:, None], values, 0.0)
            score = tl.dot(query, tl.trans(keys))
        else:
            if RING:
                place = (peek(pages).to(tl.int64) * HK + head) * S + slot
            else:
                page = peek(pages + tl.where(live, slot // S, 0)).to(tl.int64)
                place = (page * HK + head) * S + slot % S
            here = live if MASKED else live | True
            keys = tl.load(k_state + place[None, :] * D + d[:, None], mask=here[None, :] & (d < D)[:, None], other=0.0)
            values = tl.load(
                v_state + place[:, None] * DV + dv[None, :], mask=here[:, None] & (dv < DV)[None, :], other=0.0
            )
            keys, values = decode(keys, query.dtype), decode(values, query.dtype)
            score = tl.dot(query, keys)
        p, fade, mass, peak = absorb(
            mass, peak, score, slot, live, position, length, key_scale, S, scale, window, softcap, sink_tokens, RING,
            MASKED,
        )  # fmt: skip
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None])
    return acc, mass, peak


@triton.jit
def walk_pairs(
    even, odd, mass, peak, query_even, query_odd, key_scale, k_map, v_map, pages, head, begin, end, kept, skipped,
    position, length, top,
    HK: tl.constexpr, S: tl.constexpr, scale: tl.constexpr, window: tl.constexpr, softcap: tl.constexpr,
    sink_tokens: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``walk`` over codes of eight bits, read as int16: two columns each, which meet the query's even and odd columns
    and add to even and odd columns of the result. Halfwords reach the tensor cores' layout by ``ldmatrix``; bytes of
    values, whose columns are not along the product, one by one."""
    for block in range(begin, end):
        start = tl.where(block < kept, block, block + skipped) * BN
        slot = start + tl.arange(0, BN)
        live = slot < top
        at = (peek(pages + start // S) * HK + head) * S + start % S
        keys = k_map.load([at, 0])
        values = v_map.load([at, 0])
        if MASKED:  # the codes past the sequence may be NaN's
            values = tl.where(live[:, None], values, 0)
        score = tl.dot(query_even, tl.trans(numbers(keys, 0, 8, FORMAT, query_even.dtype)))
        score = tl.dot(query_odd, tl.trans(numbers(keys, 1, 8, FORMAT, query_odd.dtype)), score)
        p, fade, mass, peak = absorb(
            mass, peak, score, slot, live, position, length, key_scale, S, scale, window, softcap, sink_tokens, False,
            MASKED,
        )  # fmt: skip
        p = p.to(query_even.dtype)
        even = tl.dot(p, numbers(values, 0, 8, FORMAT, p.dtype), even * fade[:, None])
        odd = tl.dot(p, numbers(values, 1, 8, FORMAT, p.dtype), odd * fade[:, None])
    return even, odd, mass, peak


@triton.jit
def halves(x):
    """Even and odd columns."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def absorb(
    mass, peak, score, slot, live, position, length, key_scale,
    S: tl.constexpr, scale: tl.constexpr, window: tl.constexpr, softcap: tl.constexpr, sink_tokens: tl.constexpr,
    RING: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile's products of query and key into the running sums: weights of its values, and what fades the sums so
    far."""
    score = logit(score, key_scale, scale, softcap)
    if MASKED:
        key = ring_position(slot, length, S, sink_tokens) if RING else slot
        seen = (key[None, :] <= position[:, None]) & (live & (key >= 0))[None, :]
        if window > 0:
            near = position[:, None] - key[None, :] < window
            seen = seen & (near | (key < sink_tokens)[None, :])
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    p = tl.exp2(score - anchor[:, None])
    fade = tl.exp2(peak - anchor)
    mass = mass * fade + tl.sum(p, 1)
    return p, fade, mass, higher


@triton.jit
def logit(score, key_scale, scale: tl.constexpr, softcap: tl.constexpr):
    """A product of query and key as a logit in base 2; ``key_scale``: of the key's codes, None for values."""
    if softcap > 0:
        return softcap * tanh(times(score, key_scale, scale / softcap)) * LOG2E
    else:
        return times(score, key_scale, scale * LOG2E)


@triton.jit
def times(x, factor, constant: tl.constexpr):
    """``x * factor * constant``, by one product an element."""
    if factor is None:
        return x * constant
    else:
        return x * (factor * constant)


@triton.jit
def merge(
    partial, stats, parts, out, sinks, v_scale, head, row0, stop,
    H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, TILE: tl.constexpr, LINES: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of all parts of a tile, weighted by their log-sum-exp: CHUNK parts' loads are in flight together."""
    line = tl.arange(0, LINES)
    part = tl.arange(0, SPLITS)[:, None]
    live = part < parts
    at = stats + part * (2 * LINES) + line[None, :]
    peaks = tl.load(at, mask=live, other=float("-inf"), cache_modifier=".cg")
    masses = tl.load(at + LINES, mask=live, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, 0)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum(masses * tl.exp2(peaks - anchor[None, :]), 0)
    acc = tl.zeros((LINES, BDV), tl.float32)
    some = tl.arange(0, CHUNK)
    spot = line[:, None] * BDV + tl.arange(0, BDV)[None, :]
    for begin in range(0, parts, CHUNK):
        held = begin + some < parts
        peaks_at = stats + (begin + some)[:, None] * (2 * LINES) + line[None, :]
        weight = tl.exp2(
            tl.load(peaks_at, mask=held[:, None], other=float("-inf"), cache_modifier=".cg") - anchor[None, :]
        )
        sums_at = partial + (begin + some)[:, None, None] * (LINES * BDV) + spot[None, :, :]
        sums = tl.load(sums_at, mask=held[:, None, None], other=0.0, cache_modifier=".cg")
        acc += tl.sum(sums * weight[:, :, None], 0)
    row = row0 + line // G
    ok = (line < TILE * G) & (row < stop)
    store_rows(out, sinks, v_scale, acc, mass, peak, head, line, row, ok, H, G, DV, BDV)


@triton.jit
def ring_position(slot, length, S: tl.constexpr, sink_tokens: tl.constexpr):
    """Position a ring slot holds when the sequence has ``length`` tokens, -1 for none (StateGroup says where)."""
    PERIOD: tl.constexpr = S - sink_tokens
    behind = length - 1 - sink_tokens - (slot - sink_tokens)
    turn = behind % PERIOD
    turn = tl.where(turn < 0, turn + PERIOD, turn)  # the device's remainder has the dividend's sign
    latest = length - 1 - turn
    if sink_tokens > 0:
        first = tl.where(slot < length, slot, -1)
        return tl.where(slot < sink_tokens, first, tl.where(latest < sink_tokens, -1, latest))
    return latest


@triton.jit
def store_rows(
    out, sinks, v_scale, acc, mass, peak, head, line, row, ok,
    H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Normalizes a tile and stores it; sink logits join the softmax here, and codes of values become values. A row
    that sees nothing gives zeros."""
    if sinks is not None:
        sink = tl.load(sinks + head * G + line % G).to(tl.float32) * LOG2E
        higher = tl.maximum(peak, sink)
        fade = tl.exp2(peak - higher)
        mass = mass * fade + tl.exp2(sink - higher)
        acc = acc * fade[:, None]
    value = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    if v_scale is not None:
        value = value * tl.load(v_scale + head)
    dv = tl.arange(0, BDV)
    at = (row.to(tl.int64) * H + head * G + line % G) * DV
    tl.store(out + at[:, None] + dv[None, :], value.to(out.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])
