"""Attention of a ragged batch over paged or ring KV states: prefill, decode, and mixes of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Scratch, Selection
from ._common import BANDWIDTH, LAUNCH_US, LOG2E, SM_COUNT, cdiv, launch, nbytes, pdl_release, pdl_wait, pow2, tanh


@triton.jit
def attention(
    q, k_state, v_state, table, cu, lens, sinks, out, partial, stats, counter,
    N: tl.constexpr, W: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    S: tl.constexpr, Q_HEAD: tl.constexpr, Q_ROW: tl.constexpr, scale: tl.constexpr, window: tl.constexpr,
    softcap: tl.constexpr, sink_tokens: tl.constexpr, RING: tl.constexpr, DECODE: tl.constexpr,
    TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PN: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (T, H, DV) of q (H, T, D) over states (B, HK, S, D), (B, HK, S, DV); see llmopt.cached_attention.

    Grid (tiles of TILE rows of one sequence, HK, SPLITS). A tile holds all H / HK heads that share keys (BM ≥ TILE
    · H / HK lines), so that keys are read once for them. Softmax is online, in base 2. With SPLITS > 1 the keys are
    divided; each part leaves its sums, and the last to come merges them by their log-sum-exp.
    Floor: the keys and values of each sequence once, or 4·rows·keys·H·D operations.
    """
    G: tl.constexpr = H // HK
    head = tl.program_id(1)
    split = tl.program_id(2)
    pdl_release(PDL)
    pdl_wait(PDL)
    if DECODE:
        tile = tl.program_id(0)
        sequence = tile
        row0 = tile
        length = tl.load(lens + sequence)
        stop = tl.where(length > 0, row0 + 1, row0)
    else:
        tile = tl.num_programs(0) - 1 - tl.program_id(0)  # tiles with the most keys first
        i = tl.arange(0, PN)
        starts = tl.load(cu + i, mask=i < N, other=0)
        stops = tl.load(cu + i + 1, mask=i < N, other=0)
        tiles = (stops - starts + TILE - 1) // TILE
        sequence = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32))
        before = tl.sum(tl.where(i < sequence, tiles, 0))
        found = sequence < N
        sequence = tl.where(found, sequence, 0)
        row0 = tl.load(cu + sequence) + (tile - before) * TILE
        stop = tl.where(found, tl.load(cu + sequence + 1), row0)
        length = tl.load(lens + sequence)
    line = tl.arange(0, BM)
    row = row0 + line // G
    ok = (line // G < TILE) & (row < stop)
    position = length - stop + row
    top = tl.minimum(row0 + TILE, stop) - stop + length  # keys that the tile's last row sees
    if RING:
        top = tl.minimum(length, S)
        skipped = 0
        kept = 0
    elif window > 0:
        kept = (sink_tokens + BN - 1) // BN
        skipped = tl.maximum(tl.maximum(length - stop + row0 - window + 1, 0) // BN - kept, 0)
        kept = tl.minimum(kept, tl.cdiv(top, BN))
    else:
        skipped = 0
        kept = 0
    blocks = tl.where(row0 < stop, tl.maximum(tl.cdiv(top, BN) - skipped, 0), 0)
    share = tl.cdiv(blocks, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, blocks)
    if begin < end:
        d = tl.arange(0, BD)
        dv = tl.arange(0, BDV)
        at = (head * G + line % G) * Q_HEAD + row.to(tl.int64) * Q_ROW
        query = tl.load(q + at[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        peak = tl.full((BM,), float("-inf"), tl.float32)
        mass = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BDV), tl.float32)
        for block in range(begin, end):
            slot = tl.where(block < kept, block, block + skipped) * BN + tl.arange(0, BN)
            live = slot < top
            if RING:
                page = tl.load(table + sequence * W).to(tl.int64)
                place = (page * HK + head) * S + slot
                key = ring_position(slot, length, S, sink_tokens)
            else:
                page = tl.load(table + sequence * W + slot // S, mask=live, other=0).to(tl.int64)
                place = (page * HK + head) * S + slot % S
                key = slot
            keys = tl.load(k_state + place[None, :] * D + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
            score = tl.dot(query, keys)
            if softcap > 0:
                score = softcap * tanh(score * (scale / softcap)) * LOG2E
            else:
                score = score * (scale * LOG2E)
            seen = (key[None, :] <= position[:, None]) & (live & (key >= 0))[None, :]
            if window > 0:
                near = position[:, None] - key[None, :] < window
                seen = seen & (near | (key < sink_tokens)[None, :])
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(score - anchor[:, None])
            fade = tl.exp2(peak - anchor)
            values = tl.load(
                v_state + place[:, None] * DV + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0.0
            )
            mass = mass * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None])
            peak = higher
        if SPLITS == 1:
            store_rows(out, sinks, acc, mass, peak, head, line, row, ok, H, G, DV, BDV)
        else:
            unit = (tile * HK + head) * SPLITS
            spot = line[:, None] * BDV + dv[None, :]
            tl.store(partial + (unit + split).to(tl.int64) * (BM * BDV) + spot, acc)
            tl.store(stats + (unit + split) * (2 * BM) + line, peak)
            tl.store(stats + (unit + split) * (2 * BM) + BM + line, mass)
            tl.debug_barrier()
            parts = tl.cdiv(blocks, share)
            came = tl.atomic_add(counter + tile * HK + head, 1, sem="acq_rel")
            if came == parts - 1:
                tl.debug_barrier()
                peak = tl.full((BM,), float("-inf"), tl.float32)
                mass = tl.zeros((BM,), tl.float32)
                acc = tl.zeros((BM, BDV), tl.float32)
                for part in range(parts):
                    other = tl.load(stats + (unit + part) * (2 * BM) + line, cache_modifier=".cg")
                    weight = tl.load(stats + (unit + part) * (2 * BM) + BM + line, cache_modifier=".cg")
                    sums = tl.load(partial + (unit + part).to(tl.int64) * (BM * BDV) + spot, cache_modifier=".cg")
                    higher = tl.maximum(peak, other)
                    anchor = tl.where(higher == float("-inf"), 0.0, higher)
                    old, new = tl.exp2(peak - anchor), tl.exp2(other - anchor)
                    mass = mass * old + weight * new
                    acc = acc * old[:, None] + sums * new[:, None]
                    peak = higher
                store_rows(out, sinks, acc, mass, peak, head, line, row, ok, H, G, DV, BDV)
                tl.store(counter + tile * HK + head, 0)


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
    out, sinks, acc, mass, peak, head, line, row, ok,
    H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Normalizes a tile and stores it; sink logits join the softmax here. A row that sees nothing gives zeros."""
    if sinks is not None:
        sink = tl.load(sinks + head * G + line % G).to(tl.float32) * LOG2E
        higher = tl.maximum(peak, sink)
        fade = tl.exp2(peak - higher)
        mass = mass * fade + tl.exp2(sink - higher)
        acc = acc * fade[:, None]
    value = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    dv = tl.arange(0, BDV)
    at = (row.to(tl.int64) * H + head * G + line % G) * DV
    tl.store(out + at[:, None] + dv[None, :], value.to(out.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])


def shape_tiles(decode: bool, rows: int, groups: int, d: int, dv: int, sequences: int, units: int, arch: int) -> Any:
    """Tile sizes: lines, keys, splits, warps and stages, for a shape nobody measured."""
    wide = max(pow2(d), pow2(dv)) > 128
    if decode or rows * groups <= 32:
        lines, keys, warps, stages = max(16, pow2(groups)), 32 if wide else 64, 4, 3
    else:
        lines, keys, warps, stages = max(64 if wide else 128, pow2(groups)), 32 if wide else 64, 4 if wide else 8, 2
    splits = 1
    while splits < 32 and units * splits * 2 <= 2 * SM_COUNT.get(arch, 108):
        splits *= 2
    return {"BM": lines, "BN": keys, "SPLITS": splits, "warps": warps, "stages": stages}


@dataclass(frozen=True)
class Attention:
    """``llmopt.cached_attention`` for every head size, window, sink and layout of the dialect."""

    name: str = "attention"
    ops: tuple[str, ...] = ("llmopt.cached_attention",)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        q, k, x, (out,) = v["q"], v["k_state"], v["v_state"], site.outputs
        _, heads, rows, d = q.shape
        _, shared, size, _ = k.shape
        n, width = v["block_table"].shape
        dv = x.shape[3]
        if q.strides[3] != 1 or heads % shared or max(d, dv) > 256:
            return f"query strides {q.strides}, {heads} heads over {shared}, {d} dims"
        if v["ring"] and v["sink_tokens"] >= size:
            return "the ring is all sinks"
        groups = heads // shared
        decode = site.function == "decode" and n == rows
        worst = rows if decode else max(1, cdiv(rows, n))
        guess = shape_tiles(decode, worst, groups, d, dv, n, 1, site.arch)
        per_tile = max(1, guess["BM"] // groups)
        tiles = n if decode else min(rows, cdiv(rows, per_tile) + n - 1)
        key = f"{q.dtype} {'decode' if decode else 'extend'} {rows}x{n} h{heads}/{shared} d{d}"
        tuned = site.tuning.get(self.name, {}).get(key)
        c = tuned or shape_tiles(decode, worst, groups, d, dv, n, tiles * shared, site.arch)
        per_tile, splits = 1 if decode else max(1, c["BM"] // groups), c["SPLITS"]
        tiles = n if decode else min(rows, cdiv(rows, per_tile) + n - 1)
        bdv, units = max(16, pow2(dv)), tiles * shared
        many = splits > 1
        tensors = {
            "q": q, "k_state": k, "v_state": x, "table": v["block_table"], "cu": v["cu_seqlens"],
            "lens": v["seq_lens"], "sinks": v["sinks"], "out": out,
            "partial": Scratch("partial", 4 * units * splits * c["BM"] * bdv) if many else None,
            "stats": Scratch("stats", 8 * units * splits * c["BM"]) if many else None,
            "counter": Scratch("counter", 4 * units, zeroed=True) if many else None,
        }  # fmt: skip
        constants = {
            "N": n, "W": width, "H": heads, "HK": shared, "D": d, "DV": dv, "S": size, "Q_HEAD": q.strides[1],
            "Q_ROW": q.strides[2], "scale": float(v["scale"]), "window": v["window"], "softcap": float(v["softcap"]),
            "sink_tokens": v["sink_tokens"], "RING": v["ring"], "DECODE": decode, "TILE": per_tile, "BM": c["BM"],
            "BN": c["BN"], "BD": max(16, pow2(d)), "BDV": bdv, "PN": pow2(n), "SPLITS": splits,
        }  # fmt: skip
        scratch = {"partial": "*fp32", "stats": "*fp32", "counter": "*i32"}
        moved = nbytes(q, out)
        made = launch(
            site.arch, attention, (tiles, shared, splits), tensors, constants, warps=c["warps"], stages=c["stages"],
            moved=moved, scratch=scratch,
        )  # fmt: skip
        why = f"{per_tile} row(s) of {groups} head(s) a tile, keys in {splits} part(s)" + (", tuned" if tuned else "")
        return Selection((made,), why, LAUNCH_US + moved / BANDWIDTH.get(site.arch, 1e6))


KERNEL = Attention()
