"""Bytes a decode step must read: weights once, KV of every sequence. The floor of ms per token follows."""

from __future__ import annotations

from math import prod

from llmopt.program import Function, OpCall, Program, Ref, dtype_bytes

GATHERS = ("aten.embedding.default", "llmopt.embedding_q")
EXPERTS = ("llmopt.moe_experts", "llmopt.moe_experts_q")


def step_bytes(program: Program, batch: int, context: int) -> int:
    """Least bytes one decode step of ``batch`` sequences reads when each holds ``context`` tokens."""
    function = program.functions[program.entry_points["decode"]]
    return weight_bytes(program, function, batch) + batch * kv_bytes(function, context)


def weight_bytes(program: Program, function: Function, rows: int) -> int:
    """Bytes of weights a step of ``rows`` rows reads: embedding tables by row, experts by the number chosen at most."""
    needed: dict[str, int] = {}
    for call in function.calls:
        for argument, name in _weights(program, call):
            shape = tuple(int(extent) for extent in program.weights[name].type.shape)
            count = prod(shape) * _bits(call, argument, program.weights[name].type.dtype) // 8
            read = int(count * _share(function, call, argument, shape, rows))
            needed[name] = max(needed.get(name, 0), read)
    return sum(needed.values())


def kv_bytes(function: Function, context: int) -> int:
    """KV bytes one sequence of ``context`` tokens makes a decode step read, over all layers."""
    total = 0
    for call in function.calls:
        if call.op == "llmopt.cached_attention":
            window, sinks = call.args["window"], call.args["sink_tokens"]
            seen = min(context, int(window) + int(sinks)) if window else context  # type: ignore[arg-type]
            for state in ("k_state", "v_state"):
                ref = call.args[state]
                assert isinstance(ref, Ref)
                _, heads, _, width = function.types[ref.name].shape
                total += seen * int(heads) * int(width) * dtype_bytes(function.types[ref.name].dtype)
    return total


def _weights(program: Program, call: OpCall) -> list[tuple[str, str]]:
    """(argument, weight name) of each weight a call takes."""
    return [(a, v.name) for a, v in call.args.items() if isinstance(v, Ref) and v.name in program.weights]


def _bits(call: OpCall, argument: str, dtype: str) -> int:
    """Bits an element takes once packed: codes and zero points have the width of their scheme."""
    if call.op.endswith("_q") and argument.endswith(("codes", "zeros")):
        return int(call.args["bits"])  # type: ignore[arg-type]
    return 8 * dtype_bytes(dtype)


def _share(function: Function, call: OpCall, argument: str, shape: tuple[int, ...], rows: int) -> float:
    """Share of a weight the call touches."""
    if call.op in GATHERS and argument != "indices":
        return min(1.0, rows / shape[0])
    if call.op in EXPERTS:
        index = call.args["index"]
        assert isinstance(index, Ref)
        return min(1.0, rows * int(function.types[index.name].shape[-1]) / shape[0])
    return 1.0
