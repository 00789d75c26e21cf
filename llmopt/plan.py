"""What a build will need, before it: sizes, KV memory, the batch × context that fits, the floor in ms per token."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler import CompileOptions, pass_context, run_passes
from llmopt.errors import CheckpointError, ConfigError
from llmopt.frontend import Checkpoint, capture, load_checkpoint
from llmopt.frontend.blueprint import Blueprint
from llmopt.frontend.checkpoint import INDEX, SINGLE, read_json, refuse
from llmopt.ir.weights import Weight
from llmopt.lower.lowering import lower
from llmopt.lower.memory import intervals, plan_memory
from llmopt.program import Program, Ref, StateGroup, WeightPart, dtype_bytes
from llmopt.recipe import Recipe
from llmopt.registry import load_target
from llmopt.report.traffic import step_bytes

CHUNK = 512
"""Rows of the prefill chunk whose activations are set aside."""


@dataclass(frozen=True)
class Absent(Weight):
    """A tensor of which only the shape is known."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        raise CheckpointError("there are no weights to read: only the config was given", where=f"tensor {self.name}")

    def parts(self) -> tuple[WeightPart, ...]:
        return (WeightPart(self.name, 0, self.rows),)


@dataclass(frozen=True)
class Fit:
    """How many sequences of ``context`` tokens fit, what they take, and the least time of a decode step of them.

    ``floor_ms``: bytes read / bandwidth for the whole step at that batch; ``tokens_per_s``: batch / floor.
    """

    context: int
    batch: int
    sequence_bytes: int
    floor_ms: float | None
    tokens_per_s: float | None


@dataclass(frozen=True)
class Plan:
    """The answer of ``llmopt plan``. Bytes; ``kv_per_token`` counts states that grow, ``kv_fixed`` rings per sequence.

    ``largest_context``: the longest single sequence that fits (None: the weights alone do not).
    ``floor_ms``: least time per token of one sequence by context.
    """

    model: str
    recipe: str
    parameters: int
    checkpoint_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_per_token: float
    kv_fixed: int
    max_context: int
    memory: float
    bandwidth: float
    largest_context: int | None
    floor_ms: dict[int, float]
    fits: tuple[Fit, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan_build(source: Path, recipe: Recipe, memory: float, bandwidth: float, context: int | None = None) -> Plan:
    """Plan a build of ``source``: a checkpoint directory, or a config.json without weights.

    ``memory`` in bytes, ``bandwidth`` in bytes a second, ``context`` the longest sequence (None: the recipe's, else the
    model's). Captures and runs the recipe on shapes alone. Raises what compiling raises.
    """
    with opened(source) as checkpoint:
        program = shapes_only(checkpoint, recipe, context)
    if not program.states.groups:
        raise ConfigError("the recipe has no KV cache to plan", where=recipe.name, hint="add the pass rewrite_kv_cache")
    weights, activations = packed_bytes(program), activation_bytes(program)
    room = memory - weights - activations
    return Plan(
        model=str(checkpoint.config.get("model_type")),
        recipe=recipe.name,
        parameters=sum(prod(w.shape) for w in checkpoint.weights.values()),
        checkpoint_bytes=sum(w.nbytes for w in checkpoint.files.values()),
        weight_bytes=weights,
        activation_bytes=activations,
        kv_per_token=sum(g.block_bytes() / g.block_size for g in program.states.groups if grows(g)),
        kv_fixed=sum(g.block_bytes() for g in program.states.groups if not grows(g)),
        max_context=program.max_context,
        memory=memory,
        bandwidth=bandwidth,
        largest_context=largest_context(program, room),
        floor_ms={c: 1e3 * step_bytes(program, 1, c) / bandwidth for c in contexts(program.max_context)},
        fits=tuple(fit(program, c, room, bandwidth) for c in contexts(program.max_context)),
    )


def shapes_only(checkpoint: Checkpoint, recipe: Recipe, context: int | None) -> Program:
    """The program a recipe makes of a checkpoint, of whose tensors only the shapes count."""
    target = load_target(recipe.target)
    ctx = replace(pass_context(target, recipe), shapes_only=True)
    captured = capture(checkpoint, recipe.torch_dtype, context or recipe.max_context, recipe.dequantize)
    run_passes(captured, target, recipe, ctx, CompileOptions(), None)
    return lower(captured.module)


def shape_program(source: Path, recipe: Recipe, context: int | None = None) -> tuple[Program, str]:
    """The program of ``source`` (see ``plan_build``) and the model's type. Raises what compiling raises."""
    with opened(source) as checkpoint:
        return shapes_only(checkpoint, recipe, context), str(checkpoint.config.get("model_type"))


@contextmanager
def opened(source: Path) -> Iterator[Checkpoint]:
    """The checkpoint at ``source``, or one of absent tensors for a config.json (or a folder without weights)."""
    config = source if source.is_file() else source / "config.json"
    if source.is_dir() and ((source / INDEX).exists() or (source / SINGLE).exists() or not config.exists()):
        yield load_checkpoint(source)
        return
    if not source.exists():
        raise CheckpointError("no such checkpoint or config", where=str(source))
    raw = read_json(config)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        refuse(Path(folder), raw)
        blueprint = Blueprint.of(raw)
        dtypes = {name: getattr(torch, dtype) for name, dtype in blueprint.dtypes.items()}
        weights: dict[str, Weight] = {n: Absent(n, shape, dtypes[n]) for n, shape in blueprint.shapes.items()}
        yield Checkpoint(Path(folder), raw, {}, weights, {})


def packed_bytes(program: Program) -> int:
    """Bytes of the weights with codes and zero points packed to their bits."""
    bits = {
        arg.name: int(call.args["bits"])  # type: ignore[arg-type]
        for function in program.functions.values()
        for call in function.calls
        if call.op.endswith("_q")
        for name, arg in call.args.items()
        if isinstance(arg, Ref) and name.endswith(("codes", "zeros"))
    }
    total = 0
    for name, weight in program.weights.items():
        width = bits.get(name, 8 * dtype_bytes(weight.type.dtype))
        total += -(-prod(int(d) for d in weight.type.shape) * width // 8)
    return total


def activation_bytes(program: Program) -> int:
    """Arena of a prefill chunk of one sequence, by the shared memory planner."""
    function = program.functions[program.entry_points["extend"]]
    rows = min([CHUNK, program.max_context, *(c for g in program.states.groups if (c := g.max_chunk()))])
    names = {d for t in function.types.values() for d in t.shape if isinstance(d, str) and d.isidentifier()}
    dims = dict.fromkeys(names, 1) | {"T": rows}
    return plan_memory(intervals(function, dims)).total


def grows(group: StateGroup) -> bool:
    """Whether a group's memory depends on the sequence's length."""
    return group.kind in ("paged", "slots")


def sequence_bytes(program: Program, context: int) -> int:
    """State bytes of one sequence of ``context`` tokens (a slot is as long as the context it is loaded for)."""
    total = 0.0
    for group in program.states.groups:
        if group.kind == "slots":
            total += group.block_bytes() / group.block_size * context
        else:
            total += group.block_bytes() * group.blocks_for(context)
    return int(total)


def contexts(longest: int) -> list[int]:
    """Lengths worth a line: powers of four from 512, and the longest."""
    return [c for c in (512 * 4**i for i in range(12)) if c < longest] + [longest]


def fit(program: Program, context: int, room: float, bandwidth: float) -> Fit:
    """Sequences of one length that fit in ``room`` bytes."""
    each = sequence_bytes(program, context)
    batch = max(0, int(room // each)) if each else 0
    floor = 1e3 * step_bytes(program, batch, context) / bandwidth if batch else None
    return Fit(context, batch, each, floor, batch / floor * 1e3 if floor else None)


def largest_context(program: Program, room: float) -> int | None:
    """The longest sequence that fits alone, by bisection; None when not even one token does."""
    if sequence_bytes(program, 1) > room:
        return None
    low, high = 1, program.max_context + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sequence_bytes(program, middle) <= room else (low, middle)
    return low
