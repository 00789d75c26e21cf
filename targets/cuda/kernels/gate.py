"""Gated activation: ``act(x[..., :I]) * x[..., I:]``."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..kernel import CallSite, Selection
from ._common import ACTIVATIONS, activation, cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, rows_of


@triton.jit
def gate(x, out, WIDTH: tl.constexpr, STRIDE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (T, WIDTH) of x (T, 2·WIDTH), rounding between the activation and the product as eager does.

    Floor: 3·T·WIDTH elements.
    """
    pdl_release(PDL)
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < WIDTH
    pdl_wait(PDL)
    g = tl.load(x + row * STRIDE + i, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(x + row * STRIDE + WIDTH + i, mask=ok, other=0.0).to(tl.float32)
    a = activation(g, KIND).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + i, (a * u).to(out.dtype.element_ty), mask=ok)


@dataclass(frozen=True)
class Gate:
    """``llmopt.gated_activation``."""

    name: str = "gate"
    ops: tuple[str, ...] = ("llmopt.gated_activation",)

    def select(self, site: CallSite) -> Selection | str:
        x, kind, (out,) = site.values["x"], site.values["kind"], site.outputs
        layout = rows_of(x)
        if layout is None:
            return "the rows are not evenly spaced"
        if kind not in ACTIVATIONS:
            return f"activation {kind}"
        count, stride = layout
        width = out.shape[-1]
        block = 256 if count < 16 else 1024
        constants = {"WIDTH": width, "STRIDE": stride, "KIND": kind, "BLOCK": block}
        if count >= 1 << 16:
            return f"{count} rows do not fit the grid"
        moved = nbytes(x, out)
        grid = (cdiv(width, block), count)
        made = launch(site.arch, gate, grid, {"x": x, "out": out}, constants, warps=block // 256, moved=moved)
        return Selection((made,), "memory bound", modelled_us(moved, site.arch))


KERNEL = Gate()
