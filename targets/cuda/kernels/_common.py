"""What the kernel files share: launch descriptions, layouts of rows, and small device functions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llmopt.program import dtype_bytes

from ..kernel import Argument, KernelLaunch, Scratch, Specialization, Strided, TmaOperand
from ..views import reshaped

POINTERS = {
    "bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "float64": "*fp64", "int32": "*i32",
    "int64": "*i64", "int16": "*i16", "bool": "*i1", "int8": "*i8", "uint8": "*u8", "float8_e4m3fn": "*fp8e4nv",
}  # fmt: skip
ELEMENTS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int8": "i8",
    "int16": "i16",
    "uint8": "u8",
    "float8_e4m3fn": "fp8e4nv",
}
FLOATS = ("bfloat16", "float16", "float32")
SM_COUNT = {80: 108, 89: 142, 90: 132, 100: 148}
BANDWIDTH = {80: 1.9e6, 89: 0.86e6, 90: 4.39e6, 100: 7.0e6}
"""Bytes a microsecond that a well-made streaming kernel reads: measured on sm_90, else of the data sheet."""
LAUNCH_US = 1.2
"""A graph node that does nothing (measured 1.12 us on an H200)."""

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Under programmatic dependent launch: wait until everything launched before is done and visible.

    Every block must call it before it reads what another kernel writes, or writes what another one reads: a kernel
    that skips it would end early, and the kernels after it would no longer wait for those before it.
    """
    if PDL and not INTERPRETED:
        gdc_wait()


@triton.jit
def pdl_release(PDL: tl.constexpr):
    """Let the next kernel's blocks become resident: they wait in ``pdl_wait`` where this one's work is needed."""
    if PDL and not INTERPRETED:
        gdc_launch_dependents()


@triton.jit
def prefetch(at, mask, PDL: tl.constexpr):
    """Ask L2 for the 128-byte lines that hold the pointers ``at``: weights may be fetched before ``pdl_wait``."""
    if PDL and not INTERPRETED:
        safe = tl.where(mask, at, tl.min(at.to(tl.int64)).to(at.dtype))
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [safe], tl.int32, False, 1)


@triton.jit
def peek(at):
    """int32 at the pointers ``at`` by a load that Triton does not pipeline.

    A pipelined load of an index costs the loads that depend on it their stages: with it, keys and values of a paged
    cache were single buffered. The line is in L1 after its first use.
    """
    if INTERPRETED:
        found = tl.load(at)
    else:
        found = tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [at], tl.int32, True, 1)
    return found


@triton.jit
def tanh(x):
    """fp32 tanh by one exponential; near zero, where that cancels, by its series."""
    a = tl.abs(x)
    e = tl.exp(-2 * a)
    t = tl.where(a < 0.02, a - a * a * a * 0.3333333333, (1 - e) / (1 + e))
    return tl.where(x < 0, -t, t)


@triton.jit
def activation(x, KIND: tl.constexpr):
    """The activations of llmopt.ir.ops.activation, in fp32."""
    if KIND == "silu":
        return x / (1 + tl.exp(-x))
    elif KIND == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(KIND == "relu")
        return tl.maximum(x, 0.0)


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def pow2(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def rows_of(x: Strided) -> tuple[int, int] | None:
    """(rows, stride between rows) of ``x`` (..., C) seen as dense rows of C; None when strides cannot say it."""
    flat = reshaped(x, (-1, x.shape[-1]))
    if flat is None or (flat.shape[1] > 1 and flat.strides[1] != 1):
        return None
    return flat.shape[0], flat.strides[0]


def row_pairs(x: Strided) -> tuple[int, int, int, int] | None:
    """(outer, inner, outer stride, inner stride) of the rows of ``x`` (..., C): row i lies at
    ``i // inner * outer stride + i % inner * inner stride``. None when two levels cannot say it."""
    dims = collapse(x.shape[:-1], (x.strides[:-1],))
    if len(dims) > 2 or (x.shape[-1] > 1 and x.strides[-1] != 1):
        return None
    (outer, (s0,)), (inner, (s1,)) = ([(1, (0,))] * 2 + dims)[-2:]
    return outer, inner, s0, s1


def collapse(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Dimensions (extent, stride in each operand), outermost first, with extents of 1 dropped and neighbours merged
    where every operand allows it."""
    dims: list[tuple[int, tuple[int, ...]]] = []
    for extent, steps in zip(shape, zip(*strides)):
        if extent == 1:
            continue
        if dims and all(outer == extent * inner for outer, inner in zip(dims[-1][1], steps)):
            dims[-1] = (dims[-1][0] * extent, steps)
        else:
            dims.append((extent, steps))
    return dims


def nbytes(*tensors: Strided | None) -> int:
    """Bytes of all elements of the tensors, broadcast dimensions once."""
    total = 0
    for x in tensors:
        if x is None:
            continue
        size = nbytes_of(x)
        for extent, stride in zip(x.shape, x.strides):
            size *= extent if stride else 1
        total += size
    return total


def modelled_us(moved: int, arch: int, launches: int = 1, efficiency: float = 0.8) -> float:
    """Microseconds of launches that move so many bytes at a share of the memory's speed."""
    return launches * LAUNCH_US + moved / (efficiency * BANDWIDTH.get(arch, 1e6))


def type_of(arg: Any, scratch_type: str, swizzled: bool = False) -> str:
    """Triton's type of a runtime argument; ``swizzled``: a descriptor's says the swizzle as well, for CUDA C++."""
    match arg:
        case Strided():
            return POINTERS[arg.dtype]
        case Scratch():
            return scratch_type
        case TmaOperand():
            swizzle = f",{arg.swizzle}" if swizzled else ""
            return f"tensordesc<{ELEMENTS[arg.value.dtype]}[{', '.join(map(str, arg.box))}]{swizzle}>"
        case float():
            return "fp32"
    return "i32"


def launch(
    arch: int,
    function: Any,
    grid: tuple[int, ...],
    tensors: Mapping[str, Argument | None],
    constants: Mapping[str, Any],
    *,
    warps: int = 4,
    stages: int = 3,
    moved: int = 0,
    scratch: Mapping[str, str] | None = None,
) -> KernelLaunch:
    """A launch of a jitted function. ``tensors``: runtime arguments by parameter name, None for an absent one, which
    becomes a constant; ``scratch``: types of the scratch pointers. From sm_90 on, launches are programmatic dependent
    ones."""
    pdl = arch >= 90
    given = {name: arg for name, arg in tensors.items() if arg is not None}
    absent = {name: None for name, arg in tensors.items() if arg is None}
    order = [name for name in function.arg_names if name in given]
    signature = tuple((name, type_of(given[name], (scratch or {}).get(name, ""))) for name in order)
    values = {**absent, **constants, "PDL": pdl}
    constexprs = tuple((name, values[name]) for name in function.arg_names if name in values)
    offsets = {n: a.offset * nbytes_of(a) for n, a in given.items() if isinstance(a, Strided)}
    unaligned = tuple(name for name in order if offsets.get(name, 0) % 16)
    spec = Specialization(
        function.fn.__module__, function.__name__, signature, constexprs, num_warps=warps, num_stages=stages, pdl=pdl,
        unaligned=unaligned,
    )  # fmt: skip
    full = (*grid, 1, 1)[:3]
    return KernelLaunch(spec, (full[0], full[1], full[2]), tuple(given[name] for name in order), moved)


def nbytes_of(x: Strided) -> int:
    """Bytes of one element."""
    return dtype_bytes(x.dtype)
