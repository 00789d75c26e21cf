"""Runs one kernel's launches in Triton's interpreter over tensors that lie among NaN."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmopt.program import OpCall, dtype_bytes
from targets.cuda.kernel import CallSite, Kernel, KernelLaunch, Scratch, Selection, Specialization, Strided, TmaOperand

GUARD = 512
"""Elements of NaN (or of the least integer) before and after every tensor, where the kernel must not look."""

TYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32, "*fp64": torch.float64,
         "*i32": torch.int32}  # fmt: skip


@dataclass
class Memory:
    """The pretended device memory: flat guarded tensors by buffer name, and where each value lies."""

    flat: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, x: Tensor) -> Strided:
        """Place a tensor, strides included; views of one storage stay views of one buffer."""
        size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
        flat = guarded(size, x.dtype)
        torch.as_strided(flat, x.shape, x.stride(), GUARD).copy_(x)
        self.flat[name] = flat
        return Strided(name, dtype_name(x.dtype), tuple(x.shape), tuple(x.stride()))

    def get(self, x: Strided) -> Tensor:
        """A value as a tensor over its buffer, whose elements may be seen as others."""
        flat = self.flat[x.buffer][GUARD:].view(getattr(torch, x.dtype))
        return torch.as_strided(flat, x.shape, x.strides, flat.storage_offset() + x.offset)

    def scratch(self, arg: Scratch) -> Tensor:
        """A scratch buffer: zeros where promised, else NaN."""
        if arg.name not in self.flat:
            words = guarded(-(-arg.bytes // 4), torch.int32 if arg.zeroed else torch.float32)
            if arg.zeroed:
                words[GUARD:-GUARD] = 0
            self.flat[arg.name] = words
        return self.flat[arg.name][GUARD:]

    def check_guards(self) -> None:
        """Nothing was written outside any tensor."""
        for name, flat in self.flat.items():
            fresh = guarded(0, flat.dtype)[:GUARD]
            for edge in (flat[:GUARD], flat[-GUARD:]):
                assert torch.equal(edge.view(torch.uint8), fresh.view(torch.uint8)), f"{name} was overrun"


def guarded(size: int, dtype: torch.dtype) -> Tensor:
    """``size`` elements between guards, all poison."""
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full((size + 2 * GUARD,), poison, dtype=dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def select(
    kernel: Kernel,
    op: str,
    values: Mapping[str, Any],
    outputs: Sequence[Strided],
    function: str = "decode",
    tuning: Mapping[str, Any] | None = None,
    arch: int = 90,
) -> Selection | str:
    """What a kernel answers to a call."""
    tensors = [v for v in values.values() if isinstance(v, Strided)]
    dims = {"T": max((t.shape[-2] for t in tensors if len(t.shape) > 1), default=1)}
    call = OpCall(op, {}, tuple(o.buffer for o in outputs))
    return kernel.select(CallSite(call, {}, dict(values), tuple(outputs), dims, function, arch, tuning or {}))


def run(
    kernel: Kernel,
    op: str,
    values: Mapping[str, Any],
    outputs: Sequence[tuple[Sequence[int], torch.dtype]] = (),
    *,
    in_place: Sequence[str] = (),
    function: str = "decode",
    tuning: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Results of a call: the new outputs, then the operands changed ``in_place``. Fails on a refusal or an overrun."""
    memory = Memory()
    placed = {name: place(memory, name, value) for name, value in values.items()}
    fresh = [memory.put(f"out{i}", torch.full(tuple(s), float("nan")).to(d)) for i, (s, d) in enumerate(outputs)]
    everything = [*fresh, *(placed[name] for name in in_place)]
    found = select(kernel, op, placed, everything, function, tuning)
    assert isinstance(found, Selection), found
    for launch in found.launches:
        execute(launch, memory)
    memory.check_guards()
    for launch in found.launches:
        for arg in launch.args:
            if isinstance(arg, Scratch) and arg.zeroed:
                assert not memory.flat[arg.name][GUARD:-GUARD].any(), "counters must be left zero"
    return [memory.get(x) for x in everything]


def place(memory: Memory, name: str, value: Any) -> Any:
    """A value as the kernel sees it."""
    if isinstance(value, Tensor):
        return memory.put(name, value)
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(memory.put(f"{name}{i}", item) for i, item in enumerate(value))
    return value


def interpretable(spec: Specialization) -> Any:
    """The function of a specialization; of one in Gluon or CUDA C++, which the interpreter does not run, its twin."""
    module = importlib.import_module(spec.module)
    if spec.source:
        return module.TWIN
    function = getattr(module, spec.function)
    return module.TWIN if getattr(function, "is_gluon", bool)() else function


def described(spec: Specialization, value: Tensor, box: Sequence[int]) -> Any:
    """A descriptor; for the twin of CUDA C++, whose boxes are of any size, what it takes of one."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if spec.source:
        return SimpleNamespace(base=value)
    return TensorDescriptor(value, list(value.shape), list(value.stride()), list(box))


def execute(launch: KernelLaunch, memory: Memory) -> None:
    """One launch in the interpreter."""
    spec = launch.specialization
    arguments: dict[str, Any] = dict(spec.constexprs)
    for (name, type_), arg in zip(spec.signature, launch.args, strict=True):
        if isinstance(arg, Strided):
            lies = memory.flat[arg.buffer][GUARD:]
            arguments[name] = lies.view(getattr(torch, arg.dtype))[arg.offset :]
        elif isinstance(arg, Scratch):
            arguments[name] = memory.scratch(arg).view(TYPES[type_])
        elif isinstance(arg, TmaOperand):
            assert all(s * dtype_bytes(arg.value.dtype) % 16 == 0 for s in arg.value.strides[:-1]), "TMA stride"
            arguments[name] = described(spec, memory.get(arg.value), arg.box)
        else:
            arguments[name] = arg
    with np.errstate(all="ignore"):
        interpretable(spec)[launch.grid](**arguments)


def close(found: Tensor, expected: Tensor, roundings: float = 2.0) -> None:
    """``found`` within some roundings of its dtype of ``expected`` (float64), relative to the largest entry."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20}[found.dtype]
    assert found.shape == expected.shape
    assert not found.isnan().any(), "NaN"
    error = (found.double() - expected.double()).abs().max().item()
    limit = roundings * 2.0**-bits * max(expected.double().abs().max().item(), 1e-30)
    assert error <= limit, f"error {error:.3g} over {limit:.3g}"
