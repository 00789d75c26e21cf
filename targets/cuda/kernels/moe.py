"""Mixture of experts: token–choice pairs sorted by expert, two grouped matrix products, and the weighted sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, KernelLaunch, Scratch, Selection, Strided
from ._common import ACTIVATIONS, activation, cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, pow2, rows_of

Launches = tuple[KernelLaunch, ...]


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
def gated(g, u, KIND: tl.constexpr):
    """Gates and ups in fp32 as llmopt.ir.ops.moe joins them."""
    if KIND == "swiglu_oai":
        g, u = tl.minimum(g, 7.0), tl.minimum(tl.maximum(u, -7.0), 7.0)
        h = (u + 1) * g / (1 + tl.exp(-1.702 * g))
    else:
        h = activation(g, KIND) * u
    return h


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
        h = gated(g, u, KIND)
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


def tuning_key(weights: str, index: Strided, down: Strided) -> str:
    """Key of a mixture in the kernel's entries: "bfloat16 rows x choices of experts, width x inner", of quantized
    weights with their form for the dtype."""
    experts, width, inner = down.shape
    return f"{weights} {index.shape[0]}x{index.shape[1]} of {experts} {width}x{inner}"


@dataclass(frozen=True)
class Mixture:
    """A call of experts but for their weights: ``rows`` of ``c`` numbers ``x_row`` apart, ``k`` choices each of
    ``experts`` experts of ``width`` hidden numbers."""

    x: Strided
    x_row: int
    index: Strided
    share: Strided
    out: Strided
    kind: str
    rows: int
    k: int
    experts: int
    c: int
    width: int

    @property
    def pairs(self) -> int:
        """Of a row and a choice."""
        return self.rows * self.k

    def launches(self, site: CallSite, tiles: Mapping[str, int], gate_up: Product, down: Product) -> Launches:
        """Sort the pairs, multiply by both matrices, add each row's parts."""
        pairs, experts = self.pairs, self.experts
        count = min(pairs, cdiv(pairs, tiles["BM"]) + min(experts, pairs) - 1)
        element = "*bf16" if self.x.dtype == "bfloat16" else "*fp16"
        scratch = {"order": "*i32", "starts": "*i32", "hidden": element, "parts": "*fp32"}
        order, starts = Scratch("order", 4 * pairs), Scratch("starts", 4 * experts + 4)
        hidden, parts = Scratch("hidden", 2 * pairs * self.width), Scratch("parts", 4 * pairs * self.c)
        held = {"order": order, "starts": starts, "hidden": hidden}
        sizes = {"C": self.c, "WIDTH": self.width, "E": experts, "PE": pow2(experts), "BM": tiles["BM"]}
        sizes |= {"BN": tiles["BN"]}

        def product(
            it: Product, columns: int, tensors: Mapping[str, Any], constants: Mapping[str, Any]
        ) -> KernelLaunch:
            moved = int(it.bytes * min(experts, pairs) / experts)
            return launch(
                site.arch, it.function, (cdiv(columns, tiles["BN"]), count), {**it.tensors, **held, **tensors},
                {**sizes, **it.constants, **constants}, warps=tiles["warps"], stages=tiles["stages"], moved=moved,
                scratch=scratch,
            )  # fmt: skip

        return (
            launch(
                site.arch, sort_pairs, (experts,), {"index": self.index, "order": order, "starts": starts},
                {"P": pairs, "E": experts, "BLOCK": min(1024, max(32, pow2(pairs)))}, scratch=scratch,
            ),
            product(gate_up, self.width, {"x": self.x}, {"X_ROW": self.x_row, "K": self.k, "KIND": self.kind}),
            product(down, self.c, {"share": self.share, "parts": parts}, {}),
            launch(
                site.arch, sum_choices, (self.rows, cdiv(self.c, 1024)), {"parts": parts, "out": self.out},
                {"K": self.k, "C": self.c, "BLOCK": min(1024, pow2(self.c))}, moved=4 * pairs * self.c, scratch=scratch,
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class Product:
    """One of the two grouped products: its kernel, its weights and constants, and the bytes of all experts' weights."""

    function: Any
    tensors: Mapping[str, Strided | None]
    constants: Mapping[str, Any]
    bytes: int


def read_mixture(site: CallSite, down: Strided, weights: Iterable[Strided | None]) -> Mixture | str:
    """A call whose second matrices are ``down`` (E, C, I), or why these kernels do not serve it."""
    v: Any = site.values
    x, index, share, kind = v["x"], v["index"], v["weight"], v["activation"]
    layout, (out,) = rows_of(x), site.outputs
    if kind not in (*ACTIVATIONS, "swiglu_oai"):
        return f"activation {kind}"
    dense = (index, share, down, v["gate_up_bias"], v["down_bias"], *weights)
    if layout is None or any(t is not None and not t.contiguous for t in dense) or index.dtype != "int64":
        return "operands are strided, or the choices are not int64"
    (rows, k), (experts, c, width) = index.shape, down.shape
    return Mixture(x, layout[1], index, share, out, kind, rows, k, experts, c, width)


@dataclass(frozen=True)
class Experts:
    """``llmopt.moe_experts``: four launches over scratch that holds the sorted pairs and the hidden rows."""

    name: str = "moe"
    ops: tuple[str, ...] = ("llmopt.moe_experts",)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        gate_up, down = v["gate_up"], v["down"]
        mixture = read_mixture(site, down, (gate_up,))
        if isinstance(mixture, str):
            return mixture
        tuned = site.tuning.get(self.name, {}).get(tuning_key(v["x"].dtype, v["index"], down))
        t = dict(tuned) if tuned else shape_tiles(mixture.pairs, mixture.experts)
        depth = {"BK": t["BK"]}
        launches = mixture.launches(
            site,
            t,
            Product(gate_up_experts, {"weight": gate_up, "bias": v["gate_up_bias"]}, depth, nbytes(gate_up)),
            Product(down_experts, {"weight": down, "bias": v["down_bias"]}, depth, nbytes(down)),
        )
        moved = sum(item.bytes for item in launches)
        why = f"pairs sorted by expert, tiles of {t['BM']} pairs" + (", tuned" if tuned else "")
        return Selection(launches, why, t.get("us") or modelled_us(moved, site.arch, len(launches)))


KERNEL = Experts()
