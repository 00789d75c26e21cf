"""What the linears of codes by codes share: their operands, products of a step, and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..eight_bits import ALL_COLUMNS, INTERVAL
from ..kernel import Argument, CallSite, Strided
from ._common import ACTIVATIONS, nbytes
from ._linear import Linear, flattened

STEPS = (128, 64, 32)
"""Columns that a product may take at a time: 32 is the depth of the tensor cores' instruction."""


def scheme(values: Mapping[str, Any], k: int) -> str:
    """The weights' format and what shares a scale, for the reason of a choice."""
    kind = "fp8" if values["format"] == "fp8_e4m3" else f"int{values['bits']}"
    rows, group, interval = values["block_n"], values["block_k"], values.get("interval", INTERVAL)
    if interval != INTERVAL:
        kind += " with fast accumulation" if interval == ALL_COLUMNS else f" summed over {interval} columns"
    if rows > 1:
        return f"{kind}, a tensor" if group >= k else f"{kind}, blocks of {rows}x{group}"
    return f"{kind}, a channel" if group >= k else f"{kind}, groups of {group}"


@dataclass(frozen=True)
class Linear8(Linear):
    """A linear of codes: x (m, k) and weight (n, k) of one format. ``x_scale``: (m,) or, ``static``, (1,); scales
    (k / group, n / shared). ``interval``: columns of FP8 products that the tensor cores sum, ``ALL_COLUMNS`` or more
    than a step's only with a scale a channel or tensor."""

    x_scale: Strided
    scales: Strided
    static: bool
    shared: int
    group: int
    scheme: str
    interval: int

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel over it is compiled for."""
        return {
            "N": self.n, "K": self.k, "STATIC": self.static, "SHARED": self.shared, "GROUP": self.group,
            "KIND": self.gate, "INT": self.x.dtype == "int8", "INTERVAL": self.interval,
        }  # fmt: skip

    @property
    def epilogue(self) -> dict[str, Argument | None]:
        """Operands beside the codes."""
        return {"x_scale": self.x_scale, "scales": self.scales, "bias": self.bias, "residual": self.residual}

    @property
    def moved(self) -> int:
        """Bytes that must pass through memory."""
        return nbytes(self.x, self.x_scale, self.weight, self.scales, self.residual, self.out)


def read_linear_8(site: CallSite) -> Linear8 | str:
    """The linear of a ``cuda.linear_8`` call whose input is codes already, or why these kernels cannot do it."""
    v: Any = site.values
    codes, gate, group, k = v["codes"], v["gate"], v["block_k"], v["x"].shape[-1]
    if gate is not None and gate not in ACTIVATIONS:
        return f"activation {gate}"
    if codes.dtype == "float8_e4m3fn" and site.arch < 89:
        return f"sm_{site.arch} has no FP8"
    if gate is not None and codes.shape[0] % 2:
        return "gates and ups differ in number"
    x, out, residual = flattened(v["x"]), flattened(site.outputs[0]), flattened(v["residual"])
    if x is None or out is None or (residual is None) != (v["residual"] is None):
        return "the rows are not evenly spaced"
    if not out.contiguous or not (residual is None or residual.contiguous):
        return "the results are strided"
    static, interval = v["input_scale"] is not None, v.get("interval", INTERVAL)
    if interval != INTERVAL and (codes.dtype == "int8" or group < k):
        return f"no sums of {interval or 'all'} columns of codes with a scale a group, nor of int8"
    return Linear8(
        x, codes, v["bias"], gate, residual, out, v["x_scale"], v["scales"], static, v["block_n"], group, scheme(v, k),
        interval,
    )  # fmt: skip


def grouped(bk: int, linear: Linear8) -> int:
    """Columns of a step: ``bk``, or fewer where groups are smaller."""
    return bk if linear.group >= linear.k else next(s for s in STEPS if s <= bk and linear.group % s == 0)


@triton.jit
def code_product(acc, w, a, s, WHOLE: tl.constexpr, SWAP: tl.constexpr, BK: tl.constexpr, INTERVAL: tl.constexpr):
    """acc and the product of a step of codes; not WHOLE: a group's, times its scales ``s`` of each weight row.

    A sum of FP8 products leaves the tensor cores after at most INTERVAL columns; 0: it stays there."""
    FEW: tl.constexpr = None if INTERVAL == 0 else BK if BK < INTERVAL else INTERVAL
    SUMS: tl.constexpr = tl.int32 if w.dtype == tl.int8 else tl.float32
    if WHOLE:
        if SWAP:
            found = tl.dot(w, tl.trans(a), acc, max_num_imprecise_acc=FEW, out_dtype=SUMS)
        else:
            found = tl.dot(a, tl.trans(w), acc, max_num_imprecise_acc=FEW, out_dtype=SUMS)
    else:
        if SWAP:
            part = tl.dot(w, tl.trans(a), max_num_imprecise_acc=FEW, out_dtype=SUMS)
            found = acc + part.to(tl.float32) * s[:, None]
        else:
            part = tl.dot(a, tl.trans(w), max_num_imprecise_acc=FEW, out_dtype=SUMS)
            found = acc + part.to(tl.float32) * s[None, :]
    return found


@triton.jit
def group_scales(
    scales, start, row, n0, OFFSET: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scales of a step's group for weight rows OFFSET + ``row`` (WIDTH,), the first of which is OFFSET + n0: one load
    where a tile lies in a block of rows, instead of a register a row for its place."""
    at = scales + tl.minimum(start, K - 1) // GROUP * (N // SHARED)
    if SHARED % WIDTH == 0 and OFFSET % SHARED == 0:
        s = tl.zeros((WIDTH,), tl.float32) + tl.load(at + (OFFSET + n0) // SHARED).to(tl.float32)
    else:
        s = tl.load(at + (OFFSET + row) // SHARED).to(tl.float32)
    return s


@triton.jit
def scale_rows(tile, x_scale, m, M, STATIC: tl.constexpr):
    """A tile (BM, WIDTH) fp32 times the scales of its rows."""
    return tile * tl.load(x_scale + (m * 0 if STATIC else m), mask=m < M, other=0.0)[:, None]


@triton.jit
def scale_columns(tile, scales):
    """A tile (BM, WIDTH) fp32 times the scales of its columns, at the pointers ``scales``."""
    return tile * tl.load(scales).to(tl.float32)[None, :]
