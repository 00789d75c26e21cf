"""Linear layer of one row: the weight is read once, at the memory's speed."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..kernel import CallSite, Selection
from ..tuning import find_linear
from ._common import LAUNCH_US, cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, rows_of


@triton.jit
def gemv(
    x, weight, bias, out, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """out (N,) = weight (N, K) · x (K,) + bias, fp32 sums; a program owns ROWS outputs.

    The first weight tile is loaded before the wait for the kernel that writes x: measured on an H200, all linears of
    an 8B model take 3.54 ms without programmatic launch, 3.45 with it, 3.42 with the early tile (4.39 TB/s).
    Floor: 2·N·K bytes.
    """
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    k = tl.arange(0, BLOCK)
    EVEN: tl.constexpr = N % ROWS == 0 and K % BLOCK == 0
    at = weight + n * K + k[None, :]
    if EVEN:
        w = tl.load(at, eviction_policy="evict_first")
    else:
        w = tl.load(at, mask=(n < N) & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    pdl_release(PDL)
    pdl_wait(PDL)
    a = tl.load(x + k, mask=k < K, other=0.0)
    acc = w.to(tl.float32) * a.to(tl.float32)[None, :]
    for start in range(BLOCK, K, BLOCK):
        if EVEN:
            w = tl.load(at + start, eviction_policy="evict_first")
            a = tl.load(x + start + k)
        else:
            live = start + k < K
            w = tl.load(at + start, mask=(n < N) & live[None, :], other=0.0, eviction_policy="evict_first")
            a = tl.load(x + start + k, mask=live, other=0.0)
        acc += w.to(tl.float32) * a.to(tl.float32)[None, :]
    total = tl.sum(acc, 1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty), mask=rows < N)


def tile(n: int, k: int) -> tuple[int, int, int]:
    """(rows, block, warps) of a program: whole rows in steps of at most 2048, enough bytes in flight."""
    block = 2048 if k >= 4096 else 1024 if k >= 1024 else 256
    rows = 1 if k >= 1024 else 4
    return rows, block, max(1, block * rows // 256)


@dataclass(frozen=True)
class Gemv:
    """``aten.linear`` of one row."""

    name: str = "gemv"
    ops: tuple[str, ...] = ("aten.linear.default",)

    def select(self, site: CallSite) -> Selection | str:
        x, weight, bias, (out,) = site.values["input"], site.values["weight"], site.values["bias"], site.outputs
        n, k = weight.shape
        layout = rows_of(x)
        if layout is None or layout[0] != 1:
            return "more than one row"
        if not weight.contiguous or (bias is not None and not bias.contiguous):
            return "the weight is strided"
        tuned = find_linear(site.tuning, self.name, weight.dtype, 1, n, k)
        rows, block, warps = (tuned[0][c] for c in ("rows", "block", "warps")) if tuned else tile(n, k)
        moved = nbytes(weight, x, out)
        constants = {"N": n, "K": k, "ROWS": rows, "BLOCK": block}
        tensors = {"x": x, "weight": weight, "bias": bias, "out": out}
        made = launch(site.arch, gemv, (cdiv(n, rows),), tensors, constants, warps=warps, moved=moved)
        why = f"one row: {rows} outputs a program" + (f", {tuned[1]}" if tuned else "")
        return Selection((made,), why, modelled_us(moved, site.arch, efficiency=0.95) - LAUNCH_US / 2)


KERNEL = Gemv()
