"""Rows of a table by index: the token embedding, and the rows whose logits are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Selection, Strided
from ._common import cdiv, launch, modelled_us, pdl_release, pdl_wait, pow2, rows_of


@triton.jit
def take_rows(
    index, table, out, ROWS: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """out (T, C) = table[index]; table (ROWS, C) with ``STRIDE`` between rows; index (T,) int64.

    An index outside the table (a padding row's) reads row 0. Floor: 2·T·C elements of traffic.
    """
    pdl_release(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl_wait(PDL)
    at = tl.load(index + row)
    at = tl.where((at >= 0) & (at < ROWS), at, 0)
    tl.store(out + row * C + c, tl.load(table + at * STRIDE + c, mask=c < C), mask=c < C)


@dataclass(frozen=True)
class TakeRows:
    """``aten.embedding`` and ``aten.index_select`` along the second to last dimension."""

    name: str = "take_rows"
    ops: tuple[str, ...] = ("aten.embedding.default", "aten.index_select.default")

    def select(self, site: CallSite) -> Selection | str:
        v = site.values
        table, index = self._operands(site.call.op, v)
        if table is None or index is None:
            return f"dimension {v['dim']} is not the rows"
        layout = rows_of(table)
        if layout is None or not index.contiguous or index.dtype != "int64":
            return "the table has strides no row stride expresses, or the index is not dense int64"
        (out,) = site.outputs
        c, (rows, stride) = out.shape[-1], layout
        count = 1
        for extent in out.shape[:-1]:
            count *= extent
        block = min(pow2(c), 2048)
        moved = 2 * count * c * 2
        made = launch(
            site.arch,
            take_rows,
            (count, cdiv(c, block)),
            {"index": index, "table": table, "out": out},
            {"ROWS": rows, "C": c, "STRIDE": stride, "BLOCK": block},
            moved=moved,
        )
        return Selection((made,), "copies rows", modelled_us(moved, site.arch))

    def _operands(self, op: str, v: Any) -> tuple[Strided | None, Strided | None]:
        if op == "aten.embedding.default":
            return v["weight"], v["indices"]
        x = v["self"]
        rows_only = v["dim"] % len(x.shape) == len(x.shape) - 2 and all(d == 1 for d in x.shape[:-2])
        return (x, v["index"]) if rows_only else (None, None)


KERNEL = TakeRows()
