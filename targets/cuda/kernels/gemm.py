"""Linear layer of up to a few hundred rows: one tile a program, K in parts where tiles are too few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..fusion import LINEAR
from ..kernel import CallSite, Scratch, Selection, TmaOperand
from ..tuning import find_linear
from ._common import (
    SM_COUNT,
    activation,
    cdiv,
    launch,
    modelled_us,
    pdl_release,
    pdl_wait,
    pow2,
    prefetch,
)
from ._linear import leave_part, read_linear, take_parts

FLOPS = {80: 0.2e9, 89: 0.12e9, 90: 0.55e9, 100: 1.2e9}
"""Operations a microsecond: what one tile a program reaches of the tensor cores."""


@triton.jit
def gemm(
    x, weight, w_ptr, bias, residual, out, partial, counter, M,
    N: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr, KIND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, fp32 sums; see ``_linear`` for the gated and residual forms.

    Grid (N tiles, M tiles, SPLIT).

    With SPLIT > 1, each part of K leaves its sum in ``partial``; the last to come (``counter``, left zero) adds
    them in order, so that results do not depend on timing. ``SWAP`` computes the transposed tile, so that few rows
    become the narrow side of the tensor core's instruction, whose tall side has at least 64. ``TMA``: x and weight
    are descriptors with boxes (BM, BK) and (BN, BK), (BN / 2, BK) where gated; else pointers (x dense in K, X_ROW
    between rows; weight is ``w_ptr``). The first AHEAD columns of the tile's weights go to L2 before the wait for x.
    Floor: max of 2·N·K bytes and 2·M·N·K operations.
    """
    WIDTH: tl.constexpr = BN if KIND is None else BN // 2
    COLUMNS: tl.constexpr = N if KIND is None else N // 2
    n0 = tl.program_id(0) * WIDTH
    m0 = tl.program_id(1) * BM
    n = n0 + tl.arange(0, WIDTH)
    m = m0 + tl.arange(0, BM)
    PART: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    first = tl.program_id(2) * PART
    EVEN: tl.constexpr = K % (SPLIT * BK) == 0
    if AHEAD > 0:
        line = first + tl.arange(0, AHEAD // 64) * 64
        ok = (n < COLUMNS)[:, None] & (line < K)[None, :]
        prefetch(w_ptr + n[:, None].to(tl.int64) * K + line[None, :], ok, PDL)
        if KIND is not None:
            prefetch(w_ptr + (n + COLUMNS)[:, None].to(tl.int64) * K + line[None, :], ok, PDL)
    pdl_release(PDL)
    pdl_wait(PDL)
    acc = tl.zeros((WIDTH, BM), tl.float32) if SWAP else tl.zeros((BM, WIDTH), tl.float32)
    up = acc
    k = tl.arange(0, BK)[None, :]
    w_at = w_ptr
    x_at = x
    if not TMA:
        w_at = w_ptr + tl.where(n < COLUMNS, n, 0).to(tl.int64)[:, None] * K + k
        x_at = x + tl.where(m < M, m, 0).to(tl.int64)[:, None] * X_ROW + k
    for start in range(first, first + PART, BK):
        live = start + k < K
        if TMA:
            w = weight.load([n0, start])
            a = x.load([m0, start])
        elif EVEN:
            w = tl.load(w_at + start)
            a = tl.load(x_at + start)
        else:
            w = tl.load(w_at + start, mask=live, other=0.0)
            a = tl.load(x_at + start, mask=live, other=0.0)
        acc = tl.dot(w, tl.trans(a), acc) if SWAP else tl.dot(a, tl.trans(w), acc)
        if KIND is not None:
            if TMA:
                w = weight.load([COLUMNS + n0, start])
            elif EVEN:
                w = tl.load(w_at + COLUMNS * K + start)
            else:
                w = tl.load(w_at + COLUMNS * K + start, mask=live, other=0.0)
            up = tl.dot(w, tl.trans(a), up) if SWAP else tl.dot(a, tl.trans(w), up)
    total = tl.trans(acc) if SWAP else acc
    more = tl.trans(up) if SWAP else up
    if SPLIT > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if leave_part(total, more, partial, counter, tile, KIND, BM, BN, WIDTH, SPLIT):
            total, more = take_parts(partial, tile, KIND, BM, BN, WIDTH, SPLIT)
            finish(total, more, bias, residual, out, m, n, M, COLUMNS, KIND)
            tl.store(counter + tile, 0)
    else:
        finish(total, more, bias, residual, out, m, n, M, COLUMNS, KIND)


@triton.jit
def finish(total, up, bias, residual, out, m, n, M, COLUMNS: tl.constexpr, KIND: tl.constexpr):
    """Bias, gate, residual, rounding and the store of a tile."""
    if bias is not None:
        total += tl.load(bias + n, mask=n < COLUMNS, other=0.0).to(tl.float32)[None, :]
    if KIND is not None:
        if bias is not None:
            up += tl.load(bias + COLUMNS + n, mask=n < COLUMNS, other=0.0).to(tl.float32)[None, :]
        total = activation(total, KIND) * up
    ok = (m < M)[:, None] & (n < COLUMNS)[None, :]
    spot = m[:, None].to(tl.int64) * COLUMNS + n[None, :]
    if residual is not None:
        rest = tl.load(residual + spot, mask=ok, other=0.0).to(tl.float32)
        total = total.to(out.dtype.element_ty).to(tl.float32) + rest
    tl.store(out + spot, total.to(out.dtype.element_ty), mask=ok)


def shape_tiles(m: int, n: int, k: int, arch: int) -> dict[str, Any]:
    """Tile sizes, split and launch options for a shape nobody measured: what won at the nearest measured ones."""
    wide = n >= 16384
    c: dict[str, Any] = {"warps": 4, "stages": 4 if arch >= 90 else 3, "SWAP": 0, "AHEAD": 0, "SPLIT": 1}
    if m <= 64:
        c |= {"BM": max(16, pow2(m)), "BN": 128 if wide else 64, "BK": 128, "SWAP": 1, "AHEAD": 256}
    elif m <= 128 and not wide:
        c |= {"BM": 128, "BN": 64, "BK": 128 if arch >= 90 else 64}
    elif arch >= 90:
        c |= {"BM": 256 if wide and m > 128 else 128, "BN": 128, "BK": 64, "warps": 8}
    else:
        c |= {"BM": 128, "BN": 64, "BK": 64}
    programs, fill = cdiv(n, c["BN"]) * cdiv(m, c["BM"]), 2 * SM_COUNT.get(arch, 108)
    while c["SPLIT"] < 16 and programs * c["SPLIT"] * 2 <= fill and k >= c["SPLIT"] * 4 * c["BK"]:
        c["SPLIT"] *= 2
    return fitted(c, m, k)


def fitted(c: dict[str, Any], m: int, k: int) -> dict[str, Any]:
    """A configuration with tiles no larger than few rows or a short K need."""
    bm = max(16, pow2(m)) if m <= 64 else c["BM"]
    bk = max(16, min(c["BK"], pow2(k)))
    return {
        **c,
        "BM": bm,
        "BK": bk,
        "SPLIT": min(c["SPLIT"], cdiv(k, bk)),
        "AHEAD": min(c["AHEAD"], pow2(k) // 64 * 64),
    }


@dataclass(frozen=True)
class Gemm:
    """``aten.linear`` and ``cuda.linear`` (without its norm) of any number of rows."""

    name: str = "gemm"
    ops: tuple[str, ...] = ("aten.linear.default", LINEAR)

    def select(self, site: CallSite) -> Selection | str:
        linear = read_linear(site)
        if isinstance(linear, str):
            return linear
        m, n, k = linear.m, linear.n, linear.k
        tuned = find_linear(site.tuning, self.name, linear.dtype, m, n, k, linear.form)
        c = fitted(tuned.config, m, k) if tuned else shape_tiles(m, n, k, site.arch)
        if linear.gate is not None and c["SWAP"]:
            c["BN"] = max(c["BN"], 128)  # the instruction's tall side is 64
        tiles, split = cdiv(n, c["BN"]) * cdiv(m, c["BM"]), c["SPLIT"]
        if linear.gate is not None and n % 2:
            return "gates and ups differ in number"
        if not linear.dense:
            return "the results are strided"
        tma = bool(c.get("TMA", 1)) and linear.movable(site.arch)
        box = (c["BN"] if linear.gate is None else c["BN"] // 2, c["BK"])
        tensors = {
            "x": TmaOperand(linear.x, (c["BM"], c["BK"]), spare=True) if tma else linear.x,
            "weight": TmaOperand(linear.weight, box) if tma else None,
            "w_ptr": linear.weight if c["AHEAD"] or not tma else None, "bias": linear.bias,
            "residual": linear.residual, "out": linear.out, "M": m,
            "partial": Scratch("partial", 4 * tiles * split * c["BM"] * c["BN"]) if split > 1 else None,
            "counter": Scratch("counter", 4 * tiles, zeroed=True) if split > 1 else None,
        }  # fmt: skip
        constants = {"N": n, "K": k, "X_ROW": linear.x.strides[0], "KIND": linear.gate}
        constants |= {"SWAP": bool(c["SWAP"]), "TMA": tma}
        constants |= {name: c[name] for name in ("BM", "BN", "BK", "SPLIT", "AHEAD")}
        grid = (cdiv(n, c["BN"]), cdiv(m, c["BM"]), split)
        made = launch(
            site.arch, gemm, grid, tensors, constants, warps=c["warps"], stages=c["stages"], moved=linear.moved,
            scratch={"partial": "*fp32", "counter": "*i32"},
        )  # fmt: skip
        cost = max(modelled_us(linear.moved, site.arch), 2 * m * n * k / FLOPS.get(site.arch, 0.2e9))
        why = f"{c['BM']}x{c['BN']}x{c['BK']} tiles" + (f", K in {split}" if split > 1 else "")
        why = linear.joined + why + (f", {tuned.note}" if tuned else "")
        return Selection((made,), why, tuned.us if tuned else cost)


KERNEL = Gemm()
