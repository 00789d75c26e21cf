"""RMSNorm and LayerNorm over the last axis, alone or after a residual addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..eight_bits import NORM_ROUNDED, NORMS
from ..kernel import CallSite, Selection
from ._common import cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, pow2, row_pairs
from ._rounding import row_scale, to_codes


@triton.jit
def norm(
    x, residual, weight, bias, static, out, total, scales,
    COUNT: tl.constexpr, C: tl.constexpr, INNER: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr,
    INNER_R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr,
    eps: tl.constexpr, offset: tl.constexpr, MEAN: tl.constexpr, MUL_FP32: tl.constexpr,
    FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (COUNT, C) = norm(x) · (weight + offset) + bias; with ``residual``, total = x + residual is normed and kept.

    With ``FP8`` given, the normed row, rounded to x's dtype, is rounded on to codes: E4M3 where true, else int8; by the
    scale ``static`` (1,), or by each row's own, which go to ``scales`` (COUNT,).
    ``MEAN``: LayerNorm, else RMSNorm. Statistics in fp32; a program holds ROWS whole rows in registers, so that x is
    read once. Floor: (1 + residual + out + total)·COUNT·C elements.
    """
    c = tl.arange(0, BLOCK)[None, :]
    live = c < C
    if weight is not None:
        w = tl.load(weight + c, mask=live, other=0.0).to(tl.float32) + offset
    if bias is not None:
        b = tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    ok = (row < COUNT) & live
    pdl_release(PDL)
    pdl_wait(PDL)
    v = tl.load(x + row // INNER * X0 + row % INNER * X1 + c, mask=ok, other=0.0).to(tl.float32)
    if residual is not None:
        r = tl.load(residual + row // INNER_R * R0 + row % INNER_R * R1 + c, mask=ok, other=0.0).to(tl.float32)
        rounded = (v + r).to(total.dtype.element_ty)
        tl.store(total + row * C + c, rounded, mask=ok)
        v = rounded.to(tl.float32)
    if MEAN:
        v = tl.where(live, v - tl.sum(v, 1)[:, None] / C, 0.0)
    y = v * tl.rsqrt(tl.sum(v * v, 1)[:, None] / C + eps)
    if weight is not None:
        if not MUL_FP32:  # as the reference rounds: the normed row, and weight + offset, in the row's dtype
            y = y.to(x.dtype.element_ty).to(tl.float32)
            w = w.to(x.dtype.element_ty).to(tl.float32)
        y = y * w
    if bias is not None:
        y = y + b
    if FP8 is not None:
        y = tl.where(live, y.to(x.dtype.element_ty).to(tl.float32), 0.0)
        used = row_scale(y, static, FP8)
        y = to_codes(y, used, FP8)
        if scales is not None:
            one = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
            tl.store(scales + one, used, mask=one < COUNT)
    tl.store(out + row * C + c, y.to(out.dtype.element_ty), mask=ok)


@dataclass(frozen=True)
class Norm:
    """Every normalization of the dialect; x and residual may be strided views (heads of a fused projection)."""

    name: str = "norm"
    ops: tuple[str, ...] = (*NORMS, NORM_ROUNDED)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        x = v["input"] if "input" in v else v["x"]
        residual, bias, weight = v.get("residual"), v.get("bias"), v["weight"]
        c = x.shape[-1]
        if tuple(v.get("normalized_shape", (c,))) != (c,):
            return f"normalizes {len(v['normalized_shape'])} axes"
        if c > 32768:
            return f"a row of {c} does not fit registers"
        if any(w is not None and not w.contiguous for w in (weight, bias)):
            return "the weight is strided"
        pairs = row_pairs(x)
        pairs_r = pairs if residual is None else row_pairs(residual)
        if pairs is None or pairs_r is None:
            return "the rows have strides that two levels cannot express"
        outer, inner, x0, x1 = pairs
        block = pow2(c)
        rows = max(1, min(2048 // block, outer * inner // 128))
        rows = 1 << (rows.bit_length() - 1)
        mean, form = "layer_norm" in v.get("op", site.call.op), v.get("round")
        out, *more = site.outputs
        tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias, "out": out}
        tensors["total"] = more.pop(0) if residual is not None else None
        tensors |= {"static": v.get("input_scale"), "scales": more.pop(0) if more else None}
        constants = {
            "COUNT": outer * inner, "C": c, "INNER": inner, "X0": x0, "X1": x1,
            "INNER_R": pairs_r[1], "R0": pairs_r[2], "R1": pairs_r[3], "eps": v["eps"],
            "offset": v.get("offset", 0.0), "MEAN": mean, "MUL_FP32": mean or v["mul_in_fp32"],
            "FP8": None if form is None else form == "fp8_e4m3", "ROWS": rows, "BLOCK": block,
        }  # fmt: skip
        moved = nbytes(x, residual, *site.outputs)
        warps = max(1, min(16, rows * block // 512))
        made = launch(site.arch, norm, (cdiv(outer * inner, rows),), tensors, constants, warps=warps, moved=moved)
        return Selection(
            (made,),
            f"{rows} row(s) a program" + (f", rounded to {form}" if form else ""),
            modelled_us(moved, site.arch),
        )


KERNEL = Norm()
