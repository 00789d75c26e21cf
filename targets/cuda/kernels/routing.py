"""Reductions over short rows: softmax, top-k and sum, as the routing of experts needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, KernelLaunch, Selection
from ._common import FLOATS, cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, pow2, rows_of

LONGEST = 16384
"""Entries of a row that a program holds in registers."""


@triton.jit
def reduce_rows(
    x, out,
    COUNT: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, OP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """softmax of x (COUNT, C) into out (COUNT, C), or its sum into out (COUNT,), in fp32. Floor: each element once."""
    c = tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    ok = (row < COUNT) & (c < C)
    pdl_release(PDL)
    pdl_wait(PDL)
    v = tl.load(x + row * STRIDE + c, mask=ok, other=0.0).to(tl.float32)
    if OP == "softmax":
        v = tl.where(c < C, v, float("-inf"))
        e = tl.exp(v - tl.max(v, 1)[:, None])
        tl.store(out + row * C + c, (e / tl.sum(e, 1)[:, None]).to(out.dtype.element_ty), mask=ok)
    else:
        total = tl.sum(v, 1)[:, None]
        tl.store(out + row, total.to(out.dtype.element_ty), mask=row < COUNT)


@triton.jit
def topk(
    x, values, indices, C: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """The K largest of each row of x (T, C), best first, the lowest index first among equals: values and int64 indices.

    NaN counts as the least, so that a padding row still gives K different indices. Floor: x once.
    """
    c = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    pdl_release(PDL)
    pdl_wait(PDL)
    v = tl.load(x + row * STRIDE + c, mask=c < C, other=0.0).to(tl.float32)
    v = tl.where(v == v, v, float("-inf"))
    free = c < C
    for rank in range(K):
        best = tl.max(tl.where(free, v, float("-inf")))
        at = tl.min(tl.where(free & (v == best), c, BLOCK))
        tl.store(values + row * K + rank, best.to(values.dtype.element_ty))
        tl.store(indices + row * K + rank, at.to(tl.int64))
        free = free & (c != at)


@dataclass(frozen=True)
class RowReduction:
    """``aten.softmax`` and ``aten.sum`` over the last axis."""

    name: str = "reduce_rows"
    ops: tuple[str, ...] = ("aten.softmax.int", "aten._softmax.default", "aten.sum.dim_IntList")

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        x, (out,) = v["self"], site.outputs
        dims = v["dim"] if isinstance(v["dim"], tuple) else (v["dim"],)
        layout, c = rows_of(x), x.shape[-1]
        if [d % len(x.shape) for d in dims] != [len(x.shape) - 1]:
            return f"reduces dimensions {dims}, not the last one"
        if layout is None or c > LONGEST or x.dtype not in FLOATS:
            return f"rows of {c} {x.dtype}, or strided"
        count, stride = layout
        block = pow2(c)
        rows = max(1, min(1024 // block, pow2(count)))
        constants = {"COUNT": count, "C": c, "STRIDE": stride, "OP": "sum" if "sum" in site.call.op else "softmax"}
        constants |= {"ROWS": rows, "BLOCK": block}
        moved = nbytes(x, out)
        made = launch(
            site.arch, reduce_rows, (cdiv(count, rows),), {"x": x, "out": out}, constants,
            warps=max(1, min(16, rows * block // 512)), moved=moved,
        )  # fmt: skip
        return one(made, site.arch)


@dataclass(frozen=True)
class TopK:
    """``aten.topk`` of the largest entries of the last axis."""

    name: str = "topk"
    ops: tuple[str, ...] = ("aten.topk.default",)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        x, k, (values, indices) = v["self"], v["k"], site.outputs
        layout, c = rows_of(x), x.shape[-1]
        if v["dim"] % len(x.shape) != len(x.shape) - 1 or not v["largest"]:
            return "the largest of the last axis only"
        if layout is None or c > LONGEST or x.dtype not in FLOATS:
            return f"rows of {c} {x.dtype}, or strided"
        constants = {"C": c, "STRIDE": layout[1], "K": k, "BLOCK": pow2(c)}
        tensors = {"x": x, "values": values, "indices": indices}
        moved = nbytes(x, values, indices)
        warps = max(1, min(8, pow2(c) // 256))
        made = launch(site.arch, topk, (layout[0],), tensors, constants, warps=warps, moved=moved)
        return one(made, site.arch)


def one(made: KernelLaunch, arch: int) -> Selection:
    """The selection of a launch that holds rows in registers."""
    return Selection((made,), "a row stays in registers", modelled_us(made.bytes, arch))


KERNELS = (RowReduction(), TopK())
