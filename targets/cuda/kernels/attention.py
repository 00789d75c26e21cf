"""Attention of a ragged batch over paged or ring KV states: prefill, decode, and mixes of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from llmopt.program import dtype_bytes

from ..fusion import ATTENTION
from ..kernel import CallSite, Scratch, Selection, TmaOperand
from ._common import (
    BANDWIDTH,
    LAUNCH_US,
    SM_COUNT,
    cdiv,
    launch,
    nbytes,
    pdl_release,
    pdl_wait,
    pow2,
    prefetch,
    rows_of,
)
from ._softmax import halves, logit, merge, store_rows, walk, walk_pairs
from ._states import CODES, decode, encode, unreadable
from .gemm_q import as_elements
from .rotary import strides, turned_heads


@triton.jit
def attention(
    q, k, v, q_norm, k_norm, cos, sin, slots, k_state, v_state, k_scale, v_scale, k_map, v_map, table, cu, lens, sinks,
    out, partial, stats, counter,
    N: tl.constexpr, W: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    S: tl.constexpr, Q_HEAD: tl.constexpr, Q_ROW: tl.constexpr, K_HEAD: tl.constexpr, K_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, V_ROW: tl.constexpr, F: tl.constexpr, STRIDE: tl.constexpr, INTERLEAVED: tl.constexpr,
    eps: tl.constexpr, offset: tl.constexpr, MUL_FP32: tl.constexpr, scale: tl.constexpr, window: tl.constexpr,
    softcap: tl.constexpr, sink_tokens: tl.constexpr, RING: tl.constexpr, DECODE: tl.constexpr,
    PAIRS: tl.constexpr, TILE: tl.constexpr, LINES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, PN: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (T, H, DV) of q (H, T, D) over states (B, HK, S, D), (B, HK, S, DV); see llmopt.cached_attention.

    Grid (tiles of TILE rows of one sequence, HK, SPLITS). A tile holds all H / HK heads that share keys (TILE ·
    H / HK lines, LINES padded, of BM), so that keys are read once for them. Softmax is online, in base 2. With
    SPLITS > 1 the keys are divided; each part leaves its sums, and the last to come merges them by their log-sum-exp,
    CHUNK at a time.
    ``k_map``, ``v_map``: descriptors over the states as rows, for blocks that hold whole key tiles; else pointers.
    ``PAIRS``: the codes' format where descriptors read two codes as one int16.
    ``k_scale``, ``v_scale`` (HK,): of states that hold codes, which become numbers in registers; the first joins the
    softmax's scale, the second multiplies the result.
    Floor: the keys and values of each sequence once, or 4·rows·keys·H·D operations.

    With ``k`` (HK, T, D) and ``v`` (HK, T, DV), each row of a decode step brings its own key and value, which the
    states do not hold yet: q and k are normed and rotated here, the first part of the keys starts from the row's own,
    and writes it to its slot, which no one reads in this step.

    Lengths, bounds and tables are step inputs, in place before the step's first kernel starts: they are read, and
    the first keys fetched into L2, before the wait for the kernel that writes q.
    """
    G: tl.constexpr = H // HK
    head = tl.program_id(1)
    split = tl.program_id(2)
    pdl_release(PDL)
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
        sequence = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (i < N)).to(tl.int32))
        before = tl.sum(tl.where(i < sequence, tiles, 0))
        found = sequence < N
        sequence = tl.where(found, sequence, 0)
        row0 = tl.load(cu + sequence) + (tile - before) * TILE
        stop = tl.where(found, tl.load(cu + sequence + 1), row0)
        length = tl.load(lens + sequence)
    first = length - stop + row0  # position of the tile's first row
    FRESH: tl.constexpr = k is not None
    top = tl.minimum(row0 + TILE, stop) - stop + length - FRESH  # keys that the tile's last row sees
    skipped = 0
    kept = 0
    full = 0
    if RING:
        top = tl.minimum(length, S)
    elif window > 0:
        kept = (sink_tokens + BN - 1) // BN
        skipped = tl.maximum(tl.maximum(first - window + 1, 0) // BN - kept, 0)
        kept = tl.minimum(kept, tl.cdiv(top, BN))
    else:
        full = (first + 1 - FRESH) // BN  # key tiles that every row sees whole
    blocks = tl.where(row0 < stop, tl.maximum(tl.cdiv(top, BN) - skipped, 0), 0)
    share = tl.cdiv(blocks, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, blocks)
    owner = FRESH & (split == SPLITS - 1) & (row0 < stop)
    if (begin < end) | owner:
        pages = table + sequence * W
        start = tl.where(begin < kept, begin, begin + skipped) * BN
        if DECODE and not RING:
            slot = start + tl.arange(0, BN)
            near = slot < tl.where(begin < end, top, 0)
            page = tl.load(pages + slot // S, mask=near, other=0).to(tl.int64)
            place = ((page * HK + head) * S + slot % S)[:, None]
            EACH: tl.constexpr = 1024 // k_state.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
            lines = tl.arange(0, (BD + EACH - 1) // EACH)[None, :] * EACH
            prefetch(k_state + place * D + lines, near[:, None] & (lines < D), PDL)
            lines = tl.arange(0, (BDV + EACH - 1) // EACH)[None, :] * EACH
            prefetch(v_state + place * DV + lines, near[:, None] & (lines < DV), PDL)
        key_scale = None if k_scale is None else tl.load(k_scale + head)
        pdl_wait(PDL)
        line = tl.arange(0, BM)
        row = row0 + line // G
        ok = (line < TILE * G) & (row < stop)
        position = first + line // G
        d = tl.arange(0, BD)
        at = (head * G + line % G) * Q_HEAD + row.to(tl.int64) * Q_ROW
        if FRESH:
            one = tl.zeros((1, 1), tl.int32)
            key_at = k + head * K_HEAD + row0.to(tl.int64) * K_ROW + one
            key = turned_heads(
                key_at, one == 0, k_norm, cos, sin, row0, D, BD, F, STRIDE, INTERLEAVED, eps, offset, MUL_FP32
            )
            dv = tl.arange(0, BDV)[None, :]
            value = tl.load(v + head * V_HEAD + row0.to(tl.int64) * V_ROW + dv, mask=dv < DV, other=0.0)
            query = turned_heads(
                q + at[:, None], ok[:, None], q_norm, cos, sin, row0, D, BD, F, STRIDE, INTERLEAVED, eps, offset,
                MUL_FP32,
            )  # fmt: skip
        else:
            query = tl.load(q + at[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        peak = tl.full((BM,), float("-inf"), tl.float32)
        mass = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BDV), tl.float32)
        if FRESH:
            if owner:
                value_scale = None if v_scale is None else tl.load(v_scale + head)
                key_kept = encode(key, key_scale, k_state.dtype.element_ty)
                value_kept = encode(value, value_scale, v_state.dtype.element_ty)
                write_row(key_kept, value_kept, tl.load(slots + row0), k_state, v_state, head, HK, D, DV, S, BD, BDV)
                product = query.to(tl.float32) * decode(key_kept, query.dtype).to(tl.float32)
                peak = logit(tl.sum(product, 1), key_scale, scale, softcap)
                mass += 1.0
                acc += decode(value_kept, query.dtype).to(tl.float32)
        half = tl.minimum(tl.maximum(full, begin), end)
        if PAIRS is None:
            acc, mass, peak = walk(
                acc, mass, peak, query, k_state, v_state, key_scale, k_map, v_map, pages, head, begin, half, kept,
                skipped, position, length, top, HK, D, DV, S, scale, window, softcap, sink_tokens, RING, BN, BD, BDV,
                False,
            )  # fmt: skip
            acc, mass, peak = walk(
                acc, mass, peak, query, k_state, v_state, key_scale, k_map, v_map, pages, head, half, end, kept,
                skipped, position, length, top, HK, D, DV, S, scale, window, softcap, sink_tokens, RING, BN, BD, BDV,
                True,
            )  # fmt: skip
        else:
            query_even, query_odd = halves(query)
            even, odd = halves(acc)
            even, odd, mass, peak = walk_pairs(
                even, odd, mass, peak, query_even, query_odd, key_scale, k_map, v_map, pages, head, begin, half, kept,
                skipped, position, length, top, HK, S, scale, window, softcap, sink_tokens, PAIRS, BN, False,
            )  # fmt: skip
            even, odd, mass, peak = walk_pairs(
                even, odd, mass, peak, query_even, query_odd, key_scale, k_map, v_map, pages, head, half, end, kept,
                skipped, position, length, top, HK, S, scale, window, softcap, sink_tokens, PAIRS, BN, True,
            )  # fmt: skip
            acc = tl.reshape(tl.join(even, odd), (BM, BDV))
        if SPLITS == 1:
            store_rows(out, sinks, v_scale, acc, mass, peak, head, line, row, ok, H, G, DV, BDV)
        else:
            unit = (tile * HK + head) * SPLITS
            parts = tl.cdiv(blocks, tl.maximum(share, 1))
            part = tl.minimum(split, parts)
            if FRESH:
                parts = tl.minimum(parts + 1, SPLITS)  # one for the row's own key where the last has no others
            spot = line[:, None] * BDV + tl.arange(0, BDV)[None, :]
            some = line < LINES
            tl.store(partial + (unit + part).to(tl.int64) * (LINES * BDV) + spot, acc, mask=some[:, None])
            tl.store(stats + (unit + part) * (2 * LINES) + line, peak, mask=some)
            tl.store(stats + (unit + part) * (2 * LINES) + LINES + line, mass, mask=some)
            tl.debug_barrier()
            came = tl.atomic_add(counter + tile * HK + head, 1, sem="acq_rel")
            if came == parts - 1:
                tl.debug_barrier()
                merge(
                    partial + unit.to(tl.int64) * (LINES * BDV), stats + unit * (2 * LINES), parts, out, sinks, v_scale,
                    head, row0, stop, H, G, DV, BDV, TILE, LINES, SPLITS, CHUNK,
                )  # fmt: skip
                tl.store(counter + tile * HK + head, 0)
    else:
        pdl_wait(PDL)


@triton.jit
def write_row(
    key, value, slot, k_state, v_state, head, HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """A row's key (1, BD) and value (1, BDV) to its slot; nothing for a negative one."""
    if slot >= 0:
        line = (slot // S * HK + head) * S + slot % S
        d = tl.arange(0, BD)[None, :]
        dv = tl.arange(0, BDV)[None, :]
        tl.store(k_state + line * D + d, key, mask=d < D)
        tl.store(v_state + line * DV + dv, value, mask=dv < DV)


MIN_DEPTH = 16
"""Columns of a product at least."""
WIDE_LINES = 64
"""Lines from which products are wgmma's, whose keys and values lie in shared memory."""
MOST_LINES = (1 << 31) - 1
"""Rows a descriptor is given at most: the bound on a state's blocks is larger than any memory, and than its extents
may be."""


def shape_tiles(decode: bool, lines: int, d: int, units: int, size: int, arch: int, coded: bool) -> dict[str, int]:
    """Tile sizes, options and TMA: ``lines`` of one sequence that share keys, heads of ``d`` padded dims, ``units``
    programs before splitting the keys, KV blocks of ``size`` tokens, of codes or of values.

    Measured on an H200 with 32 heads over 8 of 128 dims: decode of one sequence at 512 and 8192 tokens takes 4.5 and
    12.4 us with blocks of 64 and descriptors, one program a multiprocessor; 6.6 and 16.1 with blocks of 16, two.
    Of 32, 64, 256 and 512 sequences at 529 tokens: 20, 40, 144, 284 us with key tiles of 64, 24, 36, 135, 267 with 32;
    two warps in place of four take 1.6% off that, 68 us for 70 at 128 sequences and 133 for 135 at 256.
    Prefill of 8192 tokens: 1118 us with blocks of 64, 1574 with 16, 1128 with key tiles of 128.
    """
    tma = arch >= 90 and size % 64 == 0
    if decode or lines <= 64:
        wide = d <= 128 and (tma or not coded)  # codes through pointers take 168 registers at 64 keys, 101 at 32
        c = {"BM": max(16, pow2(lines)), "BN": 64 if wide else 32, "warps": 4, "stages": 3}
    elif arch >= 90 and d <= 128:
        c = {"BM": 128, "BN": 64, "warps": 8, "stages": 3}
    else:  # before wgmma the sums of 128 lines spill
        c = {"BM": 64, "BN": 32 if d > 128 else 64, "warps": 4, "stages": 2}
    splits, wanted = 1, SM_COUNT.get(arch, 108) * (1 if tma else 2)
    while splits < 64 and units * splits * 2 <= wanted:
        splits *= 2
    if decode and tma and d <= 128 and splits > 1:
        c["stages"] = 4
    if decode and tma and not coded and units >= 3 * wanted:
        c |= {"BN": 32, "warps": 2}
    return {**c, "SPLITS": splits, "TMA": int(tma and size % c["BN"] == 0)}


BROUGHT = ("k", "v", "q_norm", "k_norm", "cos", "sin", "slots")
"""Runtime arguments of a step whose rows bring their own key and value."""
ALONE = {
    "K_HEAD": 0, "K_ROW": 0, "V_HEAD": 0, "V_ROW": 0, "F": 0, "STRIDE": 0, "INTERLEAVED": False, "eps": 0.0,
    "offset": 0.0, "MUL_FP32": False,
}  # fmt: skip
"""Constants of a step whose keys and values are in the states already."""


def brought(v: Any) -> dict[str, Any] | str:
    """Arguments and constants for what a decode step's rows bring, or why they do not suit."""
    k, x, tables = v["k"], v["v"], (rows_of(v["cos"]), rows_of(v["sin"]))
    if k.strides[3] != 1 or x.strides[3] != 1:
        return "key or value is not dense in its last axis"
    if tables[0] is None or tables[0] != tables[1]:
        return "the rotary tables are not laid out alike"
    return {
        **{name: v[name] for name in BROUGHT[:-1]}, "slots": v["slot_mapping"], **strides("K", k), **strides("V", x),
        "F": v["cos"].shape[-1], "STRIDE": tables[0][1], "INTERLEAVED": bool(v["interleaved"]),
        "eps": float(v["eps"]), "offset": float(v["offset"]), "MUL_FP32": bool(v["mul_in_fp32"]),
    }  # fmt: skip


def tuning_key(values: Any, decode: bool) -> str:
    """The name of a call's configuration in a tuning table."""
    q, k = values["q"], values["k_state"]
    (_, heads, rows, d), n = q.shape, values["block_table"].shape[0]
    kept = f" kv {k.dtype}" if k.dtype in CODES else ""
    return f"{q.dtype} {'decode' if decode else 'extend'} {rows}x{n} h{heads}/{k.shape[1]} d{d}{kept}"


@dataclass(frozen=True)
class Attention:
    """``llmopt.cached_attention`` and ``cuda.attention``: every head size, window, sink and layout of the dialect."""

    name: str = "attention"
    ops: tuple[str, ...] = ("llmopt.cached_attention", ATTENTION)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        q, k, x, out = v["q"], v["k_state"], v["v_state"], site.outputs[0]
        (_, heads, rows, d), (blocks, shared, size, _), dv = q.shape, k.shape, x.shape[3]
        n, width = v["block_table"].shape
        if q.strides[3] != 1 or heads % shared or max(d, dv) > 256:
            return f"query strides {q.strides}, {heads} heads over {shared}, {d} dims"
        if v["ring"] and v["sink_tokens"] >= size:
            return "the ring is all sinks"
        fresh = brought(v) if site.call.op == ATTENTION else {}
        if isinstance(fresh, str):
            return fresh
        if (refusal := unreadable(v, site.arch)) is not None:
            return refusal
        groups, bd, bdv = heads // shared, max(16, pow2(d)), max(16, pow2(dv))
        decode = site.function == "decode" and n == rows

        def tiles_of(lines: int) -> tuple[int, int]:
            per = 1 if decode else max(1, lines // groups)
            return per, n if decode else min(rows, cdiv(rows, per) + n - 1)

        lines = groups * (1 if decode else cdiv(rows, n))
        shape, coded = (decode, lines, max(bd, bdv)), k.dtype in CODES
        guess = shape_tiles(*shape, 1, size, site.arch, coded)
        units = tiles_of(max(guess["BM"], pow2(groups)))[1] * shared
        tuned = site.tuning.get(self.name, {}).get(tuning_key(v, decode))
        c = dict(tuned or shape_tiles(*shape, units, size, site.arch, coded))
        c["BM"] = max(c["BM"], pow2(groups))
        tma = bool(c["TMA"]) and not v["ring"] and all(e * dtype_bytes(k.dtype) % 16 == 0 for e in (d, dv))
        per_tile, tiles = tiles_of(c["BM"])
        held, splits = min(c["BM"], pow2(per_tile * groups)), c["SPLITS"]
        many, units = splits > 1, tiles * shared
        pairs = tma and coded and c["BM"] < WIDE_LINES and min(bd, bdv) >= 2 * MIN_DEPTH
        held_lines = min(blocks * shared * size, MOST_LINES)
        flat = [replace(state, shape=(held_lines, e), strides=(e, 1)) for state, e in ((k, d), (x, dv))]
        rows_at = [as_elements(state, "int16") for state in flat] if pairs else flat
        tensors = {
            **{name: fresh.get(name) for name in BROUGHT},
            "q": q, "k_state": k, "v_state": x, "k_scale": v.get("k_scale"), "v_scale": v.get("v_scale"),
            "k_map": TmaOperand(rows_at[0], (c["BN"], bd >> pairs)) if tma else None,
            "v_map": TmaOperand(rows_at[1], (c["BN"], bdv >> pairs)) if tma else None, "table": v["block_table"],
            "cu": v["cu_seqlens"], "lens": v["seq_lens"], "sinks": v["sinks"], "out": out,
            "partial": Scratch("partial", 4 * units * splits * held * bdv) if many else None,
            "stats": Scratch("stats", 8 * units * splits * held) if many else None,
            "counter": Scratch("counter", 4 * units, zeroed=True) if many else None,
        }  # fmt: skip
        constants = {
            "N": n, "W": width, "H": heads, "HK": shared, "D": d, "DV": dv, "S": size, "Q_HEAD": q.strides[1],
            "Q_ROW": q.strides[2], "scale": float(v["scale"]), "window": v["window"], "softcap": float(v["softcap"]),
            "sink_tokens": v["sink_tokens"], "RING": v["ring"], "DECODE": decode,
            "PAIRS": CODES[k.dtype] if pairs else None, "TILE": per_tile, "LINES": held, "BM": c["BM"],
            "BN": c["BN"], "BD": bd, "BDV": bdv, "PN": pow2(n), "SPLITS": splits,
            "CHUNK": max(1, min(splits, 8192 // (held * bdv))),
            **{name: fresh.get(name, default) for name, default in ALONE.items()},
        }  # fmt: skip
        scratch = {"partial": "*fp32", "stats": "*fp32", "counter": "*i32"}
        moved = nbytes(q, out)
        made = launch(
            site.arch, attention, (tiles, shared, splits), tensors, constants, warps=c["warps"], stages=c["stages"],
            moved=moved, scratch=scratch,
        )  # fmt: skip
        why = f"{per_tile} row(s) of {groups} head(s) a tile, keys in {splits} part(s)" + (", tuned" if tuned else "")
        why += f", {k.dtype} states" if coded else ""
        return Selection((made,), why, LAUNCH_US + moved / BANDWIDTH.get(site.arch, 1e6))


KERNEL = Attention()
