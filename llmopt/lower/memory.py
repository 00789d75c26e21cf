"""Liveness and offset planning of a function's intermediates, shared by targets and by ``plan``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmopt.program import Function, OpCall, Ref, TensorType, dtype_bytes, eval_shape

ALIGNMENT = 256

VIEWS = frozenset(
    f"aten.{op}"
    for op in (
        "view.default", "reshape.default", "transpose.int", "permute.default", "unsqueeze.default", "squeeze.dim",
        "slice.Tensor", "expand.default", "select.int", "t.default", "split.Tensor", "split_with_sizes.default",
        "chunk.default", "unflatten.int", "flatten.using_ints", "narrow.default",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A buffer alive from call ``first`` to call ``last``, both included."""

    name: str
    first: int
    last: int
    size: int


@dataclass(frozen=True)
class MemoryPlan:
    """Byte offset of each buffer in one arena of ``total`` bytes. Views share their source's offset."""

    offsets: Mapping[str, int]
    total: int


def owners(function: Function, is_view: Callable[[OpCall], bool]) -> dict[str, str]:
    """The value whose buffer each value lives in: itself, the source of a view, or an input."""
    owner = {name: name for name in function.inputs}
    for call in function.calls:
        source = next(iter(call.args.values()), None)
        for output in call.outputs:
            shares = is_view(call) and isinstance(source, Ref) and source.name in owner
            owner[output] = owner[source.name] if shares else output  # type: ignore[union-attr]
    for name, final in function.state_outputs.items():
        aliases = {final} if final in owner else set()
        owner.update(dict.fromkeys(aliases, name))
    return owner


def intervals(
    function: Function, dims: Mapping[str, int], is_view: Callable[[OpCall], bool] = lambda call: call.op in VIEWS
) -> list[Interval]:
    """Live interval and bytes of each buffer the function allocates (inputs and states excluded)."""
    owner = owners(function, is_view)
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, call in enumerate(function.calls):
        for name in (*call.refs(), *call.outputs):
            if name in owner:
                first.setdefault(owner[name], index)
                last[owner[name]] = index
    last |= {owner[name]: len(function.calls) for name in function.outputs}
    allocated = [name for name in first if name not in function.inputs]
    return [Interval(n, first[n], last[n], tensor_bytes(function.types[n], dims)) for n in allocated]


def type_bytes(type_: TensorType, dims: Mapping[str, int]) -> int:
    """Bytes of a tensor for given dims."""
    return math.prod(eval_shape(type_.shape, dims)) * dtype_bytes(type_.dtype)


def tensor_bytes(type_: TensorType, dims: Mapping[str, int]) -> int:
    """Bytes of a tensor for given dims, rounded up to the arena's alignment."""
    return -(-type_bytes(type_, dims) // ALIGNMENT) * ALIGNMENT


def plan_memory(buffers: list[Interval]) -> MemoryPlan:
    """Greedy by size: the largest buffer first, each at the lowest offset free during its whole life."""
    placed: list[tuple[int, Interval]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first, b.name)):
        offset = 0
        for start, other in sorted(placed, key=lambda item: item[0]):
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if start - offset >= buffer.size:
                break
            offset = max(offset, start + other.size)
        placed.append((offset, buffer))
    total = max((start + b.size for start, b in placed), default=0)
    return MemoryPlan({b.name: start for start, b in placed}, total)
