"""What the tiled linear kernels share: the operands of plain and joined linears, and the epilogue of a tile.

``out = gate(x · weightᵀ + bias) + residual``, each part but the product optional. With a gate of kind KIND, weight
(N, K) holds N / 2 gates above N / 2 ups, a tile has the same columns of both side by side, and out has N / 2 columns:
``act(gate) * up``, in fp32 up to there; a residual is added to what has been rounded to the output's type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from ..kernel import Argument, CallSite, Strided, TmaOperand
from ._common import ACTIVATIONS, activation, nbytes, nbytes_of, rows_of

SHARED = (227 << 10) - 512
"""Bytes of shared memory of a program on sm_90, less what the compiler adds."""


@dataclass(frozen=True)
class Linear:
    """A linear of ``m`` rows: x (m, k), weight (n, k), out (m, n or n / 2); residual as out. ``gate``: activation."""

    x: Strided
    weight: Strided
    bias: Strided | None
    gate: str | None
    residual: Strided | None
    out: Strided

    @property
    def m(self) -> int:
        """Rows."""
        return self.x.shape[0]

    @property
    def n(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def k(self) -> int:
        """Columns of x."""
        return self.x.shape[1]

    @property
    def dtype(self) -> str:
        """Of the weight."""
        return self.weight.dtype

    @property
    def dense(self) -> bool:
        """Whether result and residual are dense."""
        return self.out.contiguous and (self.residual is None or self.residual.contiguous)

    @property
    def form(self) -> str:
        """The form's mark in a tuning key."""
        return "" if self.gate is None else "gated"

    @property
    def joined(self) -> str:
        """What is joined to the product, for the reason of a choice."""
        parts = [f"{self.gate} gate"] * (self.gate is not None) + ["residual"] * (self.residual is not None)
        return f"with {' and '.join(parts)}, " if parts else ""

    @property
    def moved(self) -> int:
        """Bytes that must pass through memory."""
        return nbytes(self.x, self.weight, self.residual, self.out)

    def movable(self, arch: int) -> bool:
        """Whether the copy engine can move every operand: sm_90, rows and bases of a multiple of 16 bytes."""
        tensors = [t for t in (self.x, self.weight, self.residual, self.out) if t is not None]
        return arch >= 90 and all(
            t.strides[0] * nbytes_of(t) % 16 == 0 == t.offset * nbytes_of(t) % 16 for t in tensors
        )


def read_linear(site: CallSite) -> Linear | str:
    """The linear of an ``aten.linear`` or ``cuda.linear`` call, or why these kernels cannot do it."""
    v: Any = site.values
    weight, bias, gate = v["weight"], v["bias"], v.get("gate")
    if v.get("norm") is not None:
        return "it does not normalize its input"
    if gate is not None and gate not in ACTIVATIONS:
        return f"activation {gate}"
    flat = [flattened(t) for t in (v["input"], site.outputs[0], v.get("residual"))]
    if flat[0] is None or flat[1] is None or (flat[2] is None) != (v.get("residual") is None):
        return "the rows are not evenly spaced"
    if not weight.contiguous or (bias is not None and not bias.contiguous):
        return "the weight is strided"
    return Linear(flat[0], weight, bias, gate, flat[2], flat[1])


def flattened(x: Strided | None) -> Strided | None:
    """A tensor as (rows, columns), None when strides cannot say it."""
    layout = rows_of(x) if x is not None else None
    if x is None or layout is None:
        return None
    return replace(x, shape=(layout[0], x.shape[-1]), strides=(layout[1], 1))


def fit_stages(c: Mapping[str, Any], linear: Linear) -> dict[str, Any]:
    """A configuration of descriptors with as many load stages as fit beside the epilogue's parts of a tile."""
    columns = c["BN"] if linear.gate is None else c["BN"] // 2
    epilogue = c["BM"] * columns // c["PARTS"] * nbytes_of(linear.out) * (1 if linear.residual is None else 2)
    stage = (c["BM"] + c["BN"]) * c["BK"] * nbytes_of(linear.weight) + 16
    return {**c, "stages": max(2, min(c["stages"], (SHARED - epilogue) // stage))}


def tile_operands(linear: Linear, c: Mapping[str, Any]) -> dict[str, Argument | None]:
    """Descriptors of a tile of BM rows and BN weight rows, stored in PARTS parts of columns."""
    weight, (n, k), columns = linear.weight, linear.weight.shape, c["BN"]
    box: tuple[int, ...] = (columns, c["BK"])
    if linear.gate is not None:  # one box takes the same rows of both halves
        columns //= 2
        weight = replace(weight, shape=(2, n // 2, k), strides=(n // 2 * k, k, 1))
        box = (2, columns, c["BK"])
    part = (c["BM"], columns // c["PARTS"])
    return {
        "x": TmaOperand(linear.x, (c["BM"], c["BK"]), spare=True), "weight": TmaOperand(weight, box),
        "bias": linear.bias,
        "residual": TmaOperand(linear.residual, part) if linear.residual is not None else None,
        "out": TmaOperand(linear.out, part),
    }  # fmt: skip


def row_bounds(site: CallSite, m: int) -> dict[str, Argument | None]:
    """Where a step of the extend function says how many of its rows are real: the last of ``cu_seqlens``, a step input.
    No bounds for other functions, nor for other rows than the step's (the LM head's)."""
    count = site.dims.get("N", 0)
    if site.function != "extend" or m != site.dims.get("T") or not count:
        return {"bounds": None, "last": None}
    return {"bounds": Strided("cu_seqlens", "int32", (count + 1,), (1,)), "last": count}


@triton.jit
def real_rows(bounds, last, M):
    """Rows that hold anything, of M: what pads a step up to its bucket is not computed. In place before the step's
    first kernel starts."""
    return M if bounds is None else tl.minimum(M, tl.load(bounds + last))


@triton.jit
def store_tile(
    acc, bias, residual, out, m0, n0, N: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile whose first row is m0 and whose first column of ``out`` is n0."""
    if KIND is not None:
        HALF: tl.constexpr = BN // 2
        gate, up = halves(acc, BM, BN)
        if bias is not None:
            n = n0 + tl.arange(0, HALF)
            gate += tl.load(bias + n, mask=n < N // 2, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + N // 2 + n, mask=n < N // 2, other=0.0).to(tl.float32)[None, :]
        store_parts(activation(gate, KIND) * up, residual, out, m0, n0, BM, HALF, PARTS)
    else:
        if bias is not None:
            n = n0 + tl.arange(0, BN)
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        store_parts(acc, residual, out, m0, n0, BM, BN, PARTS)


@triton.jit
def store_parts(tile, residual, out, m0, n0, BM: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """A tile in 1, 2 or 4 parts of columns: a part's shared memory leaves room for the load stages."""
    if PARTS == 4:
        left, right = halves(tile, BM, WIDTH)
        store_parts(left, residual, out, m0, n0, BM, WIDTH // 2, 2)
        store_parts(right, residual, out, m0, n0 + WIDTH // 2, BM, WIDTH // 2, 2)
    elif PARTS == 2:
        left, right = halves(tile, BM, WIDTH)
        store_part(left, residual, out, m0, n0)
        store_part(right, residual, out, m0, n0 + WIDTH // 2)
    else:
        store_part(tile, residual, out, m0, n0)


@triton.jit
def halves(tile, BM: tl.constexpr, WIDTH: tl.constexpr):
    """The left and the right half of a tile's columns; a thread holds the same columns of both."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def store_part(part, residual, out, m0, n0):
    """Round, add the residual, round again and store."""
    if residual is not None:
        part = part.to(out.dtype).to(tl.float32) + residual.load([m0, n0]).to(tl.float32)
    out.store([m0, n0], part.to(out.dtype))


@triton.jit
def leave_part(
    total, more, partial, counter, tile, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Leave the sums of this part of K in ``partial``; whether it is the last of its tile to come."""
    spot = tl.arange(0, BM)[:, None] * BN + tl.arange(0, WIDTH)[None, :]
    mine = partial + (tile * SPLIT + tl.program_id(2)).to(tl.int64) * (BM * BN)
    tl.store(mine + spot, total)
    if KIND is not None:
        tl.store(mine + WIDTH + spot, more)
    tl.debug_barrier()
    return tl.atomic_add(counter + tile, 1, sem="acq_rel") == SPLIT - 1


@triton.jit
def take_parts(
    partial, tile, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr
):
    """The sums of all parts of K of a tile, in order."""
    tl.debug_barrier()
    spot = tl.arange(0, BM)[:, None] * BN + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((BM, WIDTH), tl.float32)
    more = total
    for part in range(SPLIT):
        at = partial + (tile * SPLIT + part).to(tl.int64) * (BM * BN) + spot
        total += tl.load(at, cache_modifier=".cg")
        if KIND is not None:
            more += tl.load(at + WIDTH, cache_modifier=".cg")
    return total, more
