"""Mixture of experts: token–choice pairs sorted by expert, two grouped matrix products, and the weighted sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Scratch, Selection, Strided
from ._common import ACTIVATIONS, activation, cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, pow2, rows_of


@triton.jit
def sort_pairs(index, order, starts, P: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """order: the P pairs by expert, each expert's in their own order; starts (E + 1,): where each expert's begin.

    One program an expert reads every choice: E·P·8 bytes out of L2, no atomics, the same order always. Choices outside
    [0, E) (a padding row's) are left out.
    """
    expert = tl.program_id(0)
    pdl_release(PDL)
    pdl_wait(PDL)
    lane = tl.arange(0, BLOCK)
    start = 0
    for first in range(0, P, BLOCK):
        e = tl.load(index + first + lane, mask=first + lane < P, other=-1)
        start += tl.sum(((e >= 0) & (e < expert)).to(tl.int32))
    tl.store(starts + expert, start)
    for first in range(0, P, BLOCK):
        e = tl.load(index + first + lane, mask=first + lane < P, other=-1)
        mine = (e == expert).to(tl.int32)
        rank = tl.cumsum(mine, 0) - mine
        tl.store(order + start + rank, first + lane, mask=mine > 0)
        start += tl.sum(mine)
    if expert == E - 1:
        tl.store(starts + E, start)


@triton.jit
def find_tile(starts, tile, E: tl.constexpr, PE: tl.constexpr, BM: tl.constexpr):
    """Expert of an m tile, its first sorted pair and the end of the expert's pairs; expert E when there is no tile."""
    i = tl.arange(0, PE)
    begin = tl.load(starts + i, mask=i < E, other=0)
    end = tl.load(starts + i + 1, mask=i < E, other=0)
    tiles = (end - begin + BM - 1) // BM
    expert = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (i < E)).to(tl.int32))
    before = tl.sum(tl.where(i < expert, tiles, 0))
    first = tl.sum(tl.where(i == expert, begin, 0)) + (tile - before) * BM
    return expert, first, tl.sum(tl.where(i == expert, end, 0))


@triton.jit
def gate_up_experts(
    x, weight, bias, order, starts, hidden,
    X_ROW: tl.constexpr, K: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, PE: tl.constexpr,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden (P, WIDTH), sorted = gate of x (T, C) · weight (E, 2·WIDTH, C)ᵀ + bias; K choices a token.

    A program does a tile of gates and their ups, with the weight as the tall operand. Floor: the chosen experts'
    weights once.
    """
    pdl_release(PDL)
    pdl_wait(PDL)
    expert, first, end = find_tile(starts, tl.program_id(1), E, PE, BM)
    if expert < E:
        m = first + tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        pair = tl.load(order + m, mask=m < end, other=0)
        OAI: tl.constexpr = KIND == "swiglu_oai"
        row_g = 2 * n if OAI else n
        row_u = 2 * n + 1 if OAI else n + WIDTH
        k = tl.arange(0, BK)
        base = weight + expert.to(tl.int64) * (2 * WIDTH * C)
        g_at = base + row_g[:, None].to(tl.int64) * C + k[None, :]
        u_at = base + row_u[:, None].to(tl.int64) * C + k[None, :]
        x_at = x + (pair // K).to(tl.int64)[:, None] * X_ROW + k[None, :]
        live, some = (n < WIDTH)[:, None], (m < end)[:, None]
        g = tl.zeros((BN, BM), tl.float32)
        u = tl.zeros((BN, BM), tl.float32)
        for start in range(0, C, BK):
            inside = (start + k < C)[None, :]
            a = tl.trans(tl.load(x_at + start, mask=some & inside, other=0.0))
            g = tl.dot(tl.load(g_at + start, mask=live & inside, other=0.0), a, g)
            u = tl.dot(tl.load(u_at + start, mask=live & inside, other=0.0), a, u)
        if bias is not None:
            own = bias + expert * (2 * WIDTH)
            g += tl.load(own + row_g, mask=n < WIDTH, other=0.0).to(tl.float32)[:, None]
            u += tl.load(own + row_u, mask=n < WIDTH, other=0.0).to(tl.float32)[:, None]
        if OAI:
            g, u = tl.minimum(g, 7.0), tl.minimum(tl.maximum(u, -7.0), 7.0)
            h = (u + 1) * g / (1 + tl.exp(-1.702 * g))
        else:
            h = activation(g, KIND) * u
        at = hidden + m[None, :].to(tl.int64) * WIDTH + n[:, None]
        tl.store(at, h.to(hidden.dtype.element_ty), mask=live & (m < end)[None, :])


@triton.jit
def down_experts(
    hidden, weight, bias, share, order, starts, parts,
    C: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, PE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts (P, C) fp32 by pair = (hidden (P, WIDTH), sorted · weight (E, C, WIDTH)ᵀ + bias) · share (P,)."""
    pdl_release(PDL)
    pdl_wait(PDL)
    expert, first, end = find_tile(starts, tl.program_id(1), E, PE, BM)
    if expert < E:
        m = first + tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        pair = tl.load(order + m, mask=m < end, other=0)
        k = tl.arange(0, BK)
        w_at = weight + expert.to(tl.int64) * (C * WIDTH) + n[:, None].to(tl.int64) * WIDTH + k[None, :]
        h_at = hidden + m[:, None].to(tl.int64) * WIDTH + k[None, :]
        live, some = (n < C)[:, None], (m < end)[:, None]
        acc = tl.zeros((BN, BM), tl.float32)
        for start in range(0, WIDTH, BK):
            inside = (start + k < WIDTH)[None, :]
            h = tl.load(h_at + start, mask=some & inside, other=0.0)
            w = tl.load(w_at + start, mask=live & inside, other=0.0)
            acc = tl.dot(w, tl.trans(h), acc)
        if bias is not None:
            acc += tl.load(bias + expert * C + n, mask=n < C, other=0.0).to(tl.float32)[:, None]
        acc *= tl.load(share + pair, mask=m < end, other=0.0).to(tl.float32)[None, :]
        tl.store(parts + pair[None, :].to(tl.int64) * C + n[:, None], acc, mask=live & (m < end)[None, :])


@triton.jit
def sum_choices(parts, out, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (T, C) = the sum of a token's K parts, in order of its choices."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl_release(PDL)
    pdl_wait(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(K):
        total += tl.load(parts + (row * K + choice) * C + c, mask=c < C, other=0.0)
    tl.store(out + row * C + c, total.to(out.dtype.element_ty), mask=c < C)


def shape_tiles(pairs: int, experts: int) -> dict[str, int]:
    """Tiles by how many pairs an expert gets on average."""
    each = cdiv(pairs, experts)
    if each <= 32:
        return {"BM": max(16, pow2(each)), "BN": 64, "BK": 128, "warps": 4, "stages": 3}
    return {"BM": 64 if each <= 64 else 128, "BN": 64, "BK": 64, "warps": 4 if each <= 64 else 8, "stages": 3}


def tuning_key(x: Strided, index: Strided, down: Strided) -> str:
    """Key of a mixture in the kernel's entries: "bfloat16 rows x choices of experts, width x inner"."""
    experts, width, inner = down.shape
    return f"{x.dtype} {index.shape[0]}x{index.shape[1]} of {experts} {width}x{inner}"


@dataclass(frozen=True)
class Experts:
    """``llmopt.moe_experts``: four launches over scratch that holds the sorted pairs and the hidden rows."""

    name: str = "moe"
    ops: tuple[str, ...] = ("llmopt.moe_experts",)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        x, index, share, gate_up, down, (out,) = (
            *(v[n] for n in ("x", "index", "weight", "gate_up", "down")),
            site.outputs,
        )
        layout, kind = rows_of(x), v["activation"]
        if kind not in (*ACTIVATIONS, "swiglu_oai"):
            return f"activation {kind}"
        dense = (index, share, gate_up, down, v["gate_up_bias"], v["down_bias"])
        if layout is None or any(t is not None and not t.contiguous for t in dense) or index.dtype != "int64":
            return "operands are strided, or the choices are not int64"
        (experts, c, width), (rows, k) = down.shape, index.shape
        pairs = rows * k
        tuned = site.tuning.get(self.name, {}).get(tuning_key(x, index, down))
        t = dict(tuned) if tuned else shape_tiles(pairs, experts)
        tiles = min(pairs, cdiv(pairs, t["BM"]) + min(experts, pairs) - 1)
        order, starts = Scratch("order", 4 * pairs), Scratch("starts", 4 * experts + 4)
        hidden, parts = Scratch("hidden", 2 * pairs * width), Scratch("parts", 4 * pairs * c)
        element = "*bf16" if x.dtype == "bfloat16" else "*fp16"
        kinds = {"order": "*i32", "starts": "*i32", "hidden": element, "parts": "*fp32"}
        held = {"order": order, "starts": starts}
        sizes = {"C": c, "WIDTH": width, "E": experts, "PE": pow2(experts), **{n: t[n] for n in ("BM", "BN", "BK")}}
        touched = min(experts, pairs) / experts
        options: dict[str, Any] = {"warps": t["warps"], "stages": t["stages"], "scratch": kinds}
        launches = (
            launch(
                site.arch, sort_pairs, (experts,), {"index": index, **held},
                {"P": pairs, "E": experts, "BLOCK": min(1024, max(32, pow2(pairs)))}, scratch=kinds,
            ),
            launch(
                site.arch, gate_up_experts, (cdiv(width, t["BN"]), tiles),
                {"x": x, "weight": gate_up, "bias": v["gate_up_bias"], **held, "hidden": hidden},
                {"X_ROW": layout[1], "K": k, "KIND": kind, **sizes}, moved=int(nbytes(gate_up) * touched), **options,
            ),
            launch(
                site.arch, down_experts, (cdiv(c, t["BN"]), tiles),
                {"hidden": hidden, "weight": down, "bias": v["down_bias"], "share": share, **held, "parts": parts},
                sizes, moved=int(nbytes(down) * touched), **options,
            ),
            launch(
                site.arch, sum_choices, (rows, cdiv(c, 1024)), {"parts": parts, "out": out},
                {"K": k, "C": c, "BLOCK": min(1024, pow2(c))}, moved=4 * pairs * c, scratch=kinds,
            ),
        )  # fmt: skip
        moved = sum(item.bytes for item in launches)
        why = f"pairs sorted by expert, tiles of {t['BM']} pairs" + (", tuned" if tuned else "")
        return Selection(launches, why, t.get("us") or modelled_us(moved, site.arch, len(launches)))


KERNEL = Experts()
