"""Activations rounded to eight bits: codes and scales for linears that multiply codes, or the rounded numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..eight_bits import ROUND, ROUNDED
from ..kernel import CallSite, Selection
from ._common import ACTIVATIONS, activation, launch, modelled_us, nbytes, pdl_release, pdl_wait, pow2, rows_of
from ._rounding import row_scale, to_codes

LONGEST = 32768
"""Elements of a row that registers hold."""


@triton.jit
def round_rows(
    x, static, out, scales, K: tl.constexpr, X_ROW: tl.constexpr, KIND: tl.constexpr, FP8: tl.constexpr,
    NUMBERS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (T, K): codes of x (T, K), scales (T,) theirs unless ``static`` (1,); with NUMBERS code · scale in x's dtype.

    With KIND x is (T, 2K) and what is rounded is the activation of its first half times the second, rounded in between
    as eager does. A program holds a row, so that it is read once. Floor: (x + out) bytes.
    """
    pdl_release(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)[None, :]
    live = k < K
    pdl_wait(PDL)
    v = tl.load(x + row * X_ROW + k, mask=live, other=0.0).to(tl.float32)
    if KIND is not None:
        u = tl.load(x + row * X_ROW + K + k, mask=live, other=0.0).to(tl.float32)
        v = activation(v, KIND).to(x.dtype.element_ty).to(tl.float32) * u
        v = tl.where(live, v.to(x.dtype.element_ty).to(tl.float32), 0.0)
    used = row_scale(v, static, FP8)
    codes = to_codes(v, used, FP8)
    if NUMBERS:
        codes *= used[:, None]
    tl.store(out + row * K + k, codes.to(out.dtype.element_ty), mask=live)
    if scales is not None:
        tl.store(scales + row + tl.arange(0, 1), used)


@dataclass(frozen=True)
class Round:
    """``llmopt.round_activations`` on every GPU; ``cuda.round`` where the tensor cores have the format."""

    name: str = "round"
    ops: tuple[str, ...] = (ROUND, ROUNDED)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        x, out, static, gate = v["x"], site.outputs[0], v["scale"], v.get("gate")
        layout, k = rows_of(x), out.shape[-1]
        if layout is None:
            return "the rows are not evenly spaced"
        if k > LONGEST:
            return f"a row of {k} does not fit registers"
        if gate is not None and gate not in ACTIVATIONS:
            return f"activation {gate}"
        block = pow2(k)
        tensors = {"x": x, "static": static, "out": out, "scales": site.outputs[1] if len(site.outputs) > 1 else None}
        constants = {
            "K": k, "X_ROW": layout[1], "KIND": gate, "FP8": v["format"] == "fp8_e4m3",
            "NUMBERS": site.call.op == ROUND, "BLOCK": block,
        }  # fmt: skip
        moved = nbytes(x, *site.outputs)
        warps = max(1, min(16, block // 512))
        made = launch(site.arch, round_rows, (layout[0],), tensors, constants, warps=warps, moved=moved)
        why = "a row a program" + ("" if static is None else ", one scale") + (f", {gate} gate" if gate else "")
        return Selection((made,), why, modelled_us(moved, site.arch))


KERNEL = Round()
