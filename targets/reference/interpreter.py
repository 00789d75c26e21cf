"""Interprets a function of a program with torch, op call by op call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import llmopt.ir.ops  # noqa: F401  (registers the dialect)
from llmopt.errors import TargetError
from llmopt.ir.ops.kv import scatter_rows
from llmopt.ir.ops.rope import rope
from llmopt.ir.samples import CPU
from llmopt.program import Arg, DimExpr, DType, Function, OpCall, Ref, eval_dim

Values = dict[str, torch.Tensor]


def write_in_place(
    k_state: torch.Tensor,
    v_state: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """llmopt.kv_write with its states aliased, as lowering promises."""
    scatter_rows(k_state, k[0], slot_mapping, k_scale)
    scatter_rows(v_state, v[0], slot_mapping, v_scale)
    return k_state, v_state


def rope_write_in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_state: torch.Tensor,
    v_state: torch.Tensor,
    slot_mapping: torch.Tensor,
    interleaved: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """llmopt.rope_kv_write with its states aliased."""
    write_in_place(k_state, v_state, rope(k, cos, sin, interleaved), v, slot_mapping, k_scale, v_scale)
    return rope(q, cos, sin, interleaved), k_state, v_state


IN_PLACE: dict[str, Callable[..., Any]] = {
    "llmopt.kv_write": write_in_place,
    "llmopt.rope_kv_write": rope_write_in_place,
}


@dataclass(frozen=True)
class Step:
    """A resolved call: the torch callable, its arguments, the outputs' names, values dead after it.

    ``placed``: its result is not made of tensors, so that it must be told where to be.
    """

    call: OpCall
    function: Callable[..., Any]
    keyword_only: frozenset[str]
    dead: tuple[str, ...]
    placed: bool


class Interpreter:
    """Runs one function. Weights are torch tensors by name; states passed as inputs are updated in place. All of them
    are on ``device``."""

    def __init__(self, function: Function, weights: Mapping[str, torch.Tensor], device: torch.device = CPU) -> None:
        self.function, self.weights, self.device = function, weights, device
        last_use = {name: i for i, call in enumerate(function.calls) for name in (*call.refs(), *call.outputs)}
        kept = {*function.outputs, *function.inputs, *weights}
        self.steps = [
            resolve(call, tuple(n for n in (*call.refs(), *call.outputs) if last_use[n] == i and n not in kept))
            for i, call in enumerate(function.calls)
        ]

    def __call__(self, inputs: Mapping[str, torch.Tensor], dims: Mapping[str, int]) -> list[torch.Tensor]:
        """Outputs of the function; ``dims`` gives the value of every symbolic dim."""
        values: Values = {**self.weights, **inputs}
        for step in self.steps:
            arguments = {name: evaluate(arg, values, dims) for name, arg in step.call.args.items()}
            positional = [a for name, a in arguments.items() if name not in step.keyword_only]
            keywords = {name: a for name, a in arguments.items() if name in step.keyword_only}
            if step.placed:
                keywords["device"] = self.device
            result = step.function(*positional, **keywords)
            outputs = step.call.outputs
            values.update(zip(outputs, result if isinstance(result, tuple | list) else (result,)))
            for name in step.dead:
                values.pop(name, None)
        return [values[name] for name in self.function.outputs]


def resolve(call: OpCall, dead: tuple[str, ...]) -> Step:
    """The torch operator of a call; raises TargetError for an op torch does not know."""
    namespace, *path = call.op.split(".")
    try:
        overload: Any = getattr(getattr(torch.ops, namespace), path[0])
        overload = getattr(overload, path[1] if len(path) > 1 else "default")
    except AttributeError as error:
        raise TargetError(f"op {call.op} is unknown to the reference target", where=call.scope or None) from error
    keyword_only = frozenset(a.name for a in overload._schema.arguments if a.kwarg_only)
    placed = any(a.name == "device" for a in overload._schema.arguments)
    return Step(call, IN_PLACE.get(call.op, overload), keyword_only, dead, placed)


def evaluate(arg: Arg, values: Values, dims: Mapping[str, int]) -> Any:
    """The torch value of an argument."""
    match arg:
        case Ref(name):
            return values[name]
        case DimExpr(expr):
            return eval_dim(expr, dims)
        case DType(name):
            return getattr(torch, name)
        case tuple():
            return [evaluate(item, values, dims) for item in arg]
    return arg


def bind_dims(function: Function, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Values of the symbolic dims, read off the inputs' shapes."""
    dims: dict[str, int] = {}
    for name in function.inputs:
        for declared, actual in zip(function.types[name].shape, inputs[name].shape):
            if isinstance(declared, str) and declared.isidentifier():
                dims[declared] = actual
    return dims
