"""Elementwise arithmetic over strided, broadcast operands, and copies that no stride expresses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, KernelLaunch, Selection, Strided
from ..views import expanded, reshaped
from ._common import FLOATS, activation, cdiv, collapse, launch, modelled_us, nbytes, pdl_release, pdl_wait, tanh

INTEGERS = ("int32", "int64")


@triton.jit
def elementwise(
    a, b, out,
    SCALAR: tl.constexpr, ALPHA: tl.constexpr, OP: tl.constexpr, WIDE: tl.constexpr,
    COUNT: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
    O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, O3: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = OP(a, b or SCALAR) over COUNT elements in up to four dimensions (N0, N1, N2, N3), in fp32 for floats.

    Floor: each operand once.
    """
    pdl_release(PDL)
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    ok = i < COUNT
    i3, i2, i1, i0 = i % N3, i // N3 % N2, i // (N3 * N2) % N1, i // (N3 * N2 * N1)
    pdl_wait(PDL)
    x = tl.load(a + (i0 * A0 + i1 * A1 + i2 * A2 + i3 * A3), mask=ok)
    if OP == "copy":
        y = x
    else:
        FLOATING: tl.constexpr = x.dtype.is_floating()
        if FLOATING:
            x = x.to(tl.float32)
        if b is not None:
            z = tl.load(b + (i0 * B0 + i1 * B1 + i2 * B2 + i3 * B3), mask=ok)
            if FLOATING:
                z = z.to(tl.float32)
        else:
            z = SCALAR
        if OP == "add":
            y = x + z * ALPHA
        elif OP == "sub":
            y = x - z * ALPHA
        elif OP == "rsub":
            y = z - x * ALPHA
        elif OP == "mul":
            y = x * z
        elif OP == "div":
            y = x / z
        elif OP == "tanh":
            y = tanh(x)
        elif OP == "sigmoid":
            y = 1 / (1 + tl.exp(-x))
        elif OP == "exp":
            y = tl.exp(x)
        elif OP == "neg":
            y = -x
        else:
            y = activation(x, OP)
    tl.store(out + (i0 * O0 + i1 * O1 + i2 * O2 + i3 * O3), y.to(out.dtype.element_ty), mask=ok)


OPS = {
    "aten.add.Tensor": "add", "aten.add.Scalar": "add", "aten.sub.Tensor": "sub", "aten.sub.Scalar": "sub",
    "aten.rsub.Scalar": "rsub", "aten.mul.Tensor": "mul", "aten.mul.Scalar": "mul", "aten.div.Tensor": "div",
    "aten.div.Scalar": "div", "aten.tanh.default": "tanh", "aten.sigmoid.default": "sigmoid",
    "aten.exp.default": "exp", "aten.neg.default": "neg", "aten.silu.default": "silu", "aten.relu.default": "relu",
    "aten.gelu.default": "gelu",
}  # fmt: skip


def strided_launch(
    arch: int, a: Strided, b: Strided | None, out: Strided, op: str, scalar: float = 0.0, alpha: float = 1.0
) -> KernelLaunch | str:
    """A launch over operands of ``out``'s shape, or why there is none."""
    operands = (a, out if b is None else b, out)
    dims = collapse(out.shape, tuple(x.strides for x in operands))
    if len(dims) > 4:
        return "more than four dimensions that do not merge"
    padded = [(1, (0, 0, 0))] * (4 - len(dims)) + dims
    extents = [extent for extent, _ in padded]
    count = extents[0] * extents[1] * extents[2] * extents[3]
    reach = max(sum((n - 1) * s for n, s in zip(x.shape, x.strides)) for x in operands)
    block = 1024 if count >= 1024 * 264 else 256
    constants: dict[str, Any] = {
        "SCALAR": scalar, "ALPHA": alpha, "OP": op, "WIDE": max(reach, count + block) >= 2**31, "COUNT": count,
        **{f"N{i}": extents[i] for i in (1, 2, 3)},
        **{f"{name}{i}": padded[i][1][j] for j, name in enumerate("ABO") for i in range(4)},
        "BLOCK": block,
    }  # fmt: skip
    moved = nbytes(a, b, out)
    return launch(
        arch,
        elementwise,
        (cdiv(count, block),),
        {"a": a, "b": b, "out": out},
        constants,
        warps=block // 256,
        moved=moved,
    )


def one(made: KernelLaunch | str, arch: int, reason: str) -> Selection | str:
    """The selection of a single launch."""
    return made if isinstance(made, str) else Selection((made,), reason, modelled_us(made.bytes, arch))


@dataclass(frozen=True)
class Elementwise:
    """Unary and binary arithmetic; one operand may be a number. A boolean or integer division is refused."""

    name: str = "elementwise"
    ops: tuple[str, ...] = tuple(OPS)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        (out,) = site.outputs
        op = OPS[site.call.op]
        if op == "gelu" and v.get("approximate", "none") == "tanh":
            op = "gelu_tanh"
        a, b = v["self"], v.get("other")
        scalar, alpha = 0.0, float(v.get("alpha", 1) or 1)
        if not isinstance(a, Strided):
            return "the first operand is a number"
        if isinstance(b, int | float):
            scalar, b = b, None
        if any(x is not None and x.dtype not in FLOATS for x in (a, b, out)) and op not in ("add", "sub", "mul"):
            return f"{op} of {a.dtype}"
        if a.dtype in INTEGERS and isinstance(scalar, float) and b is None:
            return "an integer tensor with a float"
        grown = [expanded(x, out.shape) for x in (a, b) if x is not None]
        made = strided_launch(site.arch, grown[0], grown[1] if b is not None else None, out, op, scalar, alpha)
        return one(made, site.arch, "memory bound")


@dataclass(frozen=True)
class Copy:
    """Casts, and reshapes, clones and concatenations that move data."""

    name: str = "copy"
    ops: tuple[str, ...] = (
        "aten.view.default",
        "aten.reshape.default",
        "aten._unsafe_view.default",
        "aten.flatten.using_ints",
        "aten.clone.default",
        "aten.contiguous.default",
        "aten.to.dtype",
        "aten._to_copy.default",
        "aten.cat.default",
    )

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        (out,) = site.outputs
        if site.call.op == "aten.cat.default":
            return self._cat(v["tensors"], v.get("dim", 0), out, site.arch)
        source = v["self"] if "self" in v else v["input"]
        target = reshaped(out, source.shape)
        if target is None:
            return "the result is strided"
        return one(
            strided_launch(site.arch, source, None, target, "copy"), site.arch, "the strides cannot express the result"
        )

    def _cat(self, parts: tuple[Strided, ...], dim: int, out: Strided, arch: int) -> Selection | str:
        made, start, dim = [], 0, dim % len(out.shape)
        for part in parts:
            offset = out.offset + start * out.strides[dim]
            piece = replace(out, shape=part.shape, offset=offset)
            found = strided_launch(arch, part, None, piece, "copy")
            if isinstance(found, str):
                return found
            made.append(found)
            start += part.shape[dim]
        moved = sum(item.bytes for item in made)
        return Selection(tuple(made), "one copy a part", modelled_us(moved, arch, len(made)))


KERNELS = (Elementwise(), Copy())
