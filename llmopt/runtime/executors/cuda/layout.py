"""Where everything lies on the device: weights, arena, inputs, states; and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llmopt.errors import ResourceError
from llmopt.launch import Bucket, LaunchPlan, View
from llmopt.program import Program, StatePlan, TensorType, dtype_bytes, eval_shape

ALIGNMENT = 256
KEEP_FREE = 512 << 20
"""Bytes left to the driver for kernels, graphs and its own tables."""

GB = 1e9


def align(size: int) -> int:
    """Rounded up to the device's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def type_bytes(kind: TensorType) -> int:
    """Bytes of a tensor of static shape."""
    return math.prod(eval_shape(kind.shape, {})) * dtype_bytes(kind.dtype)


def view_bytes(view: View) -> int:
    """Bytes of a dense view."""
    return math.prod(view.shape) * dtype_bytes(view.dtype)


@dataclass
class Region:
    """Named buffers packed into one allocation."""

    offsets: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def add(self, name: str, size: int) -> None:
        """Append a buffer."""
        self.offsets[name] = self.size
        self.size += align(size)


def weights_region(program: Program) -> Region:
    """Every weight the program uses."""
    region = Region()
    for name, weight in program.weights.items():
        region.add(name, type_bytes(weight.type))
    return region


def is_table(name: str) -> bool:
    """Whether an input is a block table: kept on the device and updated by difference."""
    return name.startswith("block_table_")


def tables_region(plan: LaunchPlan) -> Region:
    """A block table for each function and group at its largest: a step of one function leaves the other's alone."""
    sizes: dict[str, int] = {}
    for bucket in plan.buckets:
        for name, view in bucket.inputs.items():
            if is_table(name):
                key = f"{bucket.function}/{name}"
                sizes[key] = max(sizes.get(key, 0), view_bytes(view))
    return region_of(sizes)


def inputs_region(bucket: Bucket) -> Region:
    """The bucket's other inputs, packed so that one copy brings them all."""
    return region_of({name: view_bytes(view) for name, view in bucket.inputs.items() if not is_table(name)})


def persistent_region(plan: LaunchPlan) -> Region:
    """Buffers that outlive steps, states apart."""
    return region_of({name: view_bytes(view) for name, view in plan.persistent.items()})


def region_of(sizes: Mapping[str, int]) -> Region:
    """Buffers in order."""
    region = Region()
    for name, size in sizes.items():
        region.add(name, size)
    return region


def states_region(states: StatePlan, blocks: Mapping[str, int]) -> Region:
    """Every state with ``blocks[group]`` blocks."""
    region = Region()
    for group in states.groups:
        for spec in group.states:
            size = spec.heads * group.block_size * spec.head_dim * dtype_bytes(spec.dtype)
            region.add(spec.input, blocks[group.name] * size)
    return region


@dataclass(frozen=True)
class Budget:
    """What is asked for and what there is, in bytes."""

    weights: int
    arena: int
    inputs: int
    free: int
    kv_bytes: int | None


def size_blocks(states: StatePlan, budget: Budget, sequences: int, context: int) -> dict[str, int]:
    """Blocks of each group: what ``sequences`` full contexts need, or what fits the memory left over.

    Raises ResourceError, saying how much is missing and what to change, when one sequence would not fit or when
    ``kv_bytes`` does not.
    """
    wanted = {g.name: g.blocks_for(context) * sequences for g in states.groups}
    block_bytes = {g.name: g.block_bytes() for g in states.groups}
    least = sum(g.blocks_for(context) * block_bytes[g.name] for g in states.groups)
    fixed = budget.weights + budget.arena + budget.inputs + KEEP_FREE
    room = budget.free - fixed
    if budget.kv_bytes is not None and budget.kv_bytes < least:
        what = f"{budget.kv_bytes / GB:.3f} GB of KV hold less than one sequence of {context} tokens"
        raise ResourceError(f"{what} ({least / GB:.3f} GB)", hint="raise kv_bytes, or lower --max-context")
    limit = room if budget.kv_bytes is None else budget.kv_bytes
    if room < max(least, limit):
        raise too_large(budget, fixed, max(least, limit))
    total = sum(wanted[name] * block_bytes[name] for name in wanted)
    if total <= limit:
        return wanted
    share = (limit - least) / (total - least)
    minimum = {g.name: g.blocks_for(context) for g in states.groups}
    return {name: minimum[name] + int((wanted[name] - minimum[name]) * share) for name in wanted}


def too_large(budget: Budget, fixed: int, asked: int) -> ResourceError:
    """The error of a plan larger than the free memory."""
    need = fixed + asked
    what = (
        f"the plan needs {need / GB:.2f} GB (weights {budget.weights / GB:.2f}, activations {budget.arena / GB:.2f}, "
        f"KV at least {asked / GB:.2f}) "
        f"but {budget.free / GB:.2f} GB are free: {(need - budget.free) / GB:.2f} GB short"
    )
    return ResourceError(what, hint="lower --max-context, compile smaller extend_buckets, or free the GPU's memory")


def describe_states(states: StatePlan, blocks: Mapping[str, int], context: int) -> str:
    """One line on the KV states: blocks and tokens of each group, and GB in all."""
    parts: Iterable[str] = (f"{g.name}: {blocks[g.name]} blocks of {g.block_size} tokens" for g in states.groups)
    total = sum(blocks[g.name] * g.block_bytes() for g in states.groups)
    return f"KV {total / GB:.2f} GB ({'; '.join(parts)}), context {context}"
