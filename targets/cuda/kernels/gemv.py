"""Linear layer of one row: the weight is read once, at the memory's speed, with what stands before and after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..fusion import ABSENT, LINEAR
from ..kernel import CallSite, Selection
from ..tuning import find_linear, linear_form
from ._common import (
    ACTIVATIONS,
    LAUNCH_US,
    activation,
    cdiv,
    launch,
    modelled_us,
    nbytes,
    pdl_release,
    pdl_wait,
    rows_of,
)


@triton.jit
def gemv(
    x, weight, bias, norm, residual, out,
    N: tl.constexpr, K: tl.constexpr, eps: tl.constexpr, offset: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (N,) = gate(weight · normed x + bias) + residual, fp32 sums; a program owns ROWS outputs.

    weight (N, K), with GATE (2N, K): the activation of the first half's outputs times the second half's. With
    ``norm`` (K,), x (K,) is divided by its root mean square, after the sum, and multiplied by norm + offset. The first
    weight tile is loaded before the wait for the kernel that writes x: measured on an H200, all linears of an 8B model
    take 3.54 ms without programmatic launch, 3.45 with it, 3.42 with the early tile (4.39 TB/s). Fetching 8 MB more
    into L2 there costs 3.7 us a layer: those requests delay the tiles of programs that could go on.
    Floor: the weight's bytes.
    """
    program = tl.program_id(0)
    n = (program * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    k = tl.arange(0, BLOCK)
    EVEN: tl.constexpr = N % ROWS == 0 and K % BLOCK == 0
    live = (n < N) & (k < K)[None, :]
    at = weight + n * K + k[None, :]
    if EVEN:
        w = tl.load(at, eviction_policy="evict_first")
        if GATE is not None:
            u = tl.load(at + N * K, eviction_policy="evict_first")
    else:
        w = tl.load(at, mask=live, other=0.0, eviction_policy="evict_first")
        if GATE is not None:
            u = tl.load(at + N * K, mask=live, other=0.0, eviction_policy="evict_first")
    if norm is not None:
        s = tl.load(norm + k, mask=k < K, other=0.0)
    pdl_release(PDL)
    pdl_wait(PDL)
    a = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    square = a * a
    if norm is not None:
        a = a * (s.to(tl.float32) + offset)
    acc = w.to(tl.float32) * a[None, :]
    if GATE is not None:
        up = u.to(tl.float32) * a[None, :]
    for start in range(BLOCK, K, BLOCK):
        if EVEN:
            w = tl.load(at + start, eviction_policy="evict_first")
            if GATE is not None:
                u = tl.load(at + N * K + start, eviction_policy="evict_first")
            a = tl.load(x + start + k).to(tl.float32)
        else:
            more = (n < N) & (start + k < K)[None, :]
            w = tl.load(at + start, mask=more, other=0.0, eviction_policy="evict_first")
            if GATE is not None:
                u = tl.load(at + N * K + start, mask=more, other=0.0, eviction_policy="evict_first")
            a = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        if norm is not None:
            square += a * a
            a = a * (tl.load(norm + start + k, mask=start + k < K, other=0.0).to(tl.float32) + offset)
        acc += w.to(tl.float32) * a[None, :]
        if GATE is not None:
            up += u.to(tl.float32) * a[None, :]
    total = tl.sum(acc, 1)
    if norm is not None:
        root = tl.rsqrt(tl.sum(square) / K + eps)
        total = total * root
    other = total
    if GATE is not None:
        other = tl.sum(up, 1)
        if norm is not None:
            other = other * root
    store_outputs(total, other, bias, residual, out, program * ROWS + tl.arange(0, ROWS), N, GATE)


@triton.jit
def store_outputs(total, up, bias, residual, out, n, N: tl.constexpr, GATE: tl.constexpr):
    """The epilogue of one row: outputs ``n`` of N from their sums, with GATE from those of gates and ups."""
    ok = n < N
    if bias is not None:
        total += tl.load(bias + n, mask=ok, other=0.0).to(tl.float32)
    if GATE is not None:
        if bias is not None:
            up += tl.load(bias + N + n, mask=ok, other=0.0).to(tl.float32)
        total = activation(total, GATE) * up
    if residual is not None:
        rest = tl.load(residual + n, mask=ok, other=0.0).to(tl.float32)
        total = total.to(out.dtype.element_ty).to(tl.float32) + rest
    tl.store(out + n, total.to(out.dtype.element_ty), mask=ok)


def tile(n: int, k: int, normed: bool) -> tuple[int, int, int]:
    """(rows, block, warps) of a program nobody measured: whole rows in steps of at most 2048, enough bytes in flight.
    With a norm several rows, that share its reads: one row a program takes 18.2 us where two take 12.7 (6144 x 4096).
    """
    block = 2048 if k >= 4096 else 1024 if k >= 1024 else 256
    if normed and k >= 1024:
        return 4, 1024, 4
    rows = 1 if k >= 1024 else 4
    return rows, block, max(1, block * rows // 256)


@dataclass(frozen=True)
class Gemv:
    """``aten.linear`` and ``cuda.linear`` of one row."""

    name: str = "gemv"
    ops: tuple[str, ...] = ("aten.linear.default", LINEAR)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = {**ABSENT, **site.values}
        x, weight, (out,) = v["input"], v["weight"], site.outputs
        k, n, gate = weight.shape[1], out.shape[-1], v["gate"]
        layout = rows_of(x)
        if layout is None or layout[0] != 1:
            return "more than one row"
        if any(w is not None and not w.contiguous for w in (weight, v["bias"], v["norm"], v["residual"])):
            return "the weight is strided"
        if gate is not None and gate not in ACTIVATIONS:
            return f"activation {gate}"
        tuned = find_linear(site.tuning, self.name, weight.dtype, 1, weight.shape[0], k, linear_form(v))
        rows, block, warps = (
            (tuned[0][c] for c in ("rows", "block", "warps")) if tuned else tile(n, k, v["norm"] is not None)
        )
        moved = nbytes(weight, x, out)
        constants = {
            "N": n, "K": k, "eps": float(v["eps"]), "offset": float(v["offset"]), "GATE": gate, "ROWS": rows,
            "BLOCK": block,
        }  # fmt: skip
        tensors = {
            "x": x,
            "weight": weight,
            "bias": v["bias"],
            "norm": v["norm"],
            "residual": v["residual"],
            "out": out,
        }
        made = launch(site.arch, gemv, (cdiv(n, rows),), tensors, constants, warps=warps, moved=moved)
        why = f"one row: {rows} outputs a program" + (f", {tuned[1]}" if tuned else "")
        return Selection((made,), why, modelled_us(moved, site.arch, efficiency=0.95) - LAUNCH_US / 2)


KERNEL = Gemv()
