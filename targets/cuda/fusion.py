"""Calls of a decode bucket joined where one launch serves them: fewer launches, and less that passes through memory.

Which calls pay to join depends on the bucket's rows, which no pass can see, so it happens here, on the program:

- ``cuda.linear`` (``cuda.linear_q`` over quantized weights): a linear with what follows it (a gated activation, or the
  residual addition) and, for one row over numbers, with the RMSNorm before it: ``gate(norm(input) · weightᵀ + bias) +
  residual``, each part absent or not.
- ``cuda.linear_8``, ``cuda.round`` and ``cuda.norm_round``: linears that multiply codes of activations by codes of
  weights, and what makes those codes; see eight_bits.py.
- ``cuda.linear_chain``: linears of one row that follow each other, once these rules are through; see chain.py.
- ``cuda.attention``: RMSNorm of the query's and the key's heads, their rotation, the write of key and value, and
  attention over the states and the row's own key and value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llmopt.program import Arg, Function, OpCall, Ref

from .eight_bits import (
    FEW_BITS,
    LINEAR_8,
    QUANTIZED,
    codes_into_linears,
    fast_accumulation,
    gate_into_rounding,
    norm_into_rounding,
    runs_codes,
)
from .graph import Graph

LINEAR, LINEAR_Q, ATTENTION = "cuda.linear", "cuda.linear_q", "cuda.attention"
PLAIN_LINEAR, NORM = "aten.linear.default", "llmopt.rms_norm"
JOINED = {PLAIN_LINEAR: LINEAR, QUANTIZED: LINEAR_Q, LINEAR: LINEAR, LINEAR_Q: LINEAR_Q, LINEAR_8: LINEAR_8}
"""What a linear becomes when anything joins it."""

FEW_ROWS = 16
"""Rows up to which a residual is added in the epilogue: on an H200 that saves 0.02 ms of an 8B model's step at 8 rows
and costs 0.03 ms at 32."""

MANY_ROWS = 1024
"""Rows from which it is too: on an H200 at 8192 rows it costs a linear at most 15 of 1200 us and saves the norm 34. Not
where codes meet codes, whose tiles then have room for fewer load stages: at 2048 rows of 8B the down projection takes
242 us alone and 296 with it, with fast accumulation 152 and 169."""

GATED_CODES = 64
"""Rows up to which a gate joins a linear over codes of weights that ``gemm_q`` alone serves: on an H200 an 8B model's
takes 221 us at 128 rows with it and 65 without, for the sums of both halves leave few registers. ``gemm_ring``, whose
registers hold both, takes 45 with it."""

ABSENT = {"norm": None, "eps": 0.0, "offset": 0.0, "gate": None, "residual": None}
HEAD_NORM = {"q_norm": None, "k_norm": None, "eps": 0.0, "offset": 0.0, "mul_in_fp32": False}


Rule = Callable[[Graph, int, OpCall], None]


def fused(
    function: Function, dims: Mapping[str, int], ops: Collection[str], arch: int = 90, fast: bool = False
) -> Function:
    """The function as a bucket of these extents runs it, given what ops the kernels serve and what the GPU has; of what
    is not decode of one row a sequence only gated activations, roundings and, of many rows, residual additions are
    joined. ``fast``: FP8 products may be summed with fast accumulation."""
    decode = function.name == "decode" and dims["T"] == dims["N"]
    rules: list[Rule] = []
    if decode and ATTENTION in ops:
        rules.append(heads_into_attention)
    if LINEAR_8 in ops:
        rules.append(partial(codes_into_linears, runs=runs_codes(arch)))
    if LINEAR in ops:
        rules.append(partial(activation_into_linear, coded=partial(gates_codes, rows=dims["T"], arch=arch)))
        few = decode and dims["T"] <= FEW_ROWS
        rules += [partial(addition_into_linear, coded=few)] if few or dims["T"] >= MANY_ROWS else []
        rules += [norm_into_linears] if decode and dims["T"] == 1 else []
    if LINEAR_8 in ops:
        rules += [norm_into_rounding, gate_into_rounding]
        rules += [partial(fast_accumulation, dims=dims)] if fast and arch in FEW_BITS else []
    for rule in rules:
        graph = Graph(function)
        for at, call in enumerate(graph.calls):
            rule(graph, at, call)
        function = graph.finish()
    return function


def gates_codes(call: OpCall, rows: int, arch: int) -> bool:
    """Whether a linear over codes of weights takes the gate of its result."""
    v: Mapping[str, Any] = call.args
    streams = arch == 90 and v["block_n"] == 1 and v["block_k"] % 64 == 0 and v["format"] in ("int", "fp8_e4m3")
    return rows <= GATED_CODES or streams


def activation_into_linear(graph: Graph, at: int, call: OpCall, coded: Callable[[OpCall], bool]) -> None:
    """A linear and the gated activation of its result; ``coded``: which of those over codes of weights alone."""
    if call.op != "llmopt.gated_activation" or not graph.two_bytes(call.outputs[0]):
        return
    source = open_linear(graph, call.args["x"])
    if source is not None and (graph.calls[source].op != QUANTIZED or coded(graph.calls[source])):
        args = {**ABSENT, **graph.calls[source].args, "gate": call.args["kind"]}
        graph.places[source] = ()
        graph.places[at] = (replace(graph.calls[source], op=joined(graph, source), args=args, outputs=call.outputs),)


def addition_into_linear(graph: Graph, at: int, call: OpCall, coded: bool) -> None:
    """A linear and the residual addition; the sum's RMSNorm is left. ``coded``: one of codes by codes too."""
    if call.op != "llmopt.add_rms_norm" or not graph.two_bytes(call.outputs[1]):
        return
    source = open_linear(graph, call.args["x"])
    if source is not None and (coded or graph.calls[source].op != LINEAR_8):
        normed, total = call.outputs
        args = {**ABSENT, **graph.calls[source].args, "residual": call.args["residual"]}
        rest = {name: arg for name, arg in call.args.items() if name not in ("x", "residual")}
        graph.places[source] = ()
        graph.places[at] = (
            replace(graph.calls[source], op=joined(graph, source), args=args, outputs=(total,)),
            OpCall(NORM, {"x": Ref(total), **rest}, (normed,), call.scope),
        )


def open_linear(graph: Graph, arg: Arg) -> int | None:
    """Index of the linear, nothing joined to its result yet, whose result only this argument reads."""
    at = graph.only_from(arg, PLAIN_LINEAR, QUANTIZED, LINEAR_8)
    taken = at is not None and any(graph.calls[at].args.get(name) is not None for name in ("gate", "residual"))
    return None if taken else at


def joined(graph: Graph, at: int) -> str:
    """The op a linear becomes."""
    return JOINED[graph.calls[at].op]


def norm_into_linears(graph: Graph, at: int, call: OpCall) -> None:
    """An RMSNorm that only linears over numbers read goes into each of them."""
    if call.op != NORM or call.args["weight"] is None or not graph.two_bytes(call.outputs[0]):
        return
    (normed,) = call.outputs
    readers = graph.readers.get(normed, [])
    joins = all(
        graph.calls[i].op in (PLAIN_LINEAR, LINEAR)
        and graph.calls[i].args["input"] == Ref(normed)
        and graph.calls[i].args.get("norm") is None
        for i in readers
    )
    if readers and joins and graph.uses[normed] == len(readers):
        norm = {"norm": call.args["weight"], "eps": call.args["eps"], "offset": call.args["offset"]}
        for i in readers:
            reader = graph.calls[i]
            args = {**ABSENT, **reader.args, "input": call.args["x"], **norm}
            graph.places[i] = (replace(reader, op=JOINED[reader.op], args=args),)
        graph.places[at] = ()


def heads_into_attention(graph: Graph, at: int, call: OpCall) -> None:
    """Rotation and write of a row's heads, and the RMSNorm of each head before it, into paged attention."""
    if call.op != "llmopt.cached_attention" or call.args["ring"]:
        return
    source = graph.only_from(call.args["q"], "llmopt.rope_kv_write")
    if source is None:
        return
    write = graph.calls[source]
    _, k_state, v_state = write.outputs
    if (call.args["k_state"], call.args["v_state"]) != (Ref(k_state), Ref(v_state)):
        return
    if any(graph.readers[name] != [at] for name in (k_state, v_state)):
        return
    norms = head_norms(graph, write)
    args = {**write.args, **HEAD_NORM, **call.args, "k_state": write.args["k_state"], "v_state": write.args["v_state"]}
    args["q"] = write.args["q"]
    if norms is not None:
        for name, (view, norm) in norms.items():
            plain = graph.calls[view]
            graph.places[view] = (replace(plain, args={**plain.args, "self": graph.calls[norm].args["x"]}),)
            graph.places[norm] = ()
            args[f"{name}_norm"] = graph.calls[norm].args["weight"]
            args |= {key: graph.calls[norm].args[key] for key in ("eps", "offset", "mul_in_fp32")}
    graph.places[source] = ()
    graph.places[at] = (OpCall(ATTENTION, args, (*call.outputs, k_state, v_state), call.scope),)


def head_norms(graph: Graph, write: OpCall) -> dict[str, tuple[int, int]] | None:
    """For query and key the transposition of a normed (1, T, H, D) value and the RMSNorm; None when they are not so,
    or not alike."""
    found: dict[str, tuple[int, int]] = {}
    for name in ("q", "k"):
        view = graph.only_from(write.args[name], "aten.transpose.int")
        norm = None if view is None else graph.only_from(graph.calls[view].args["self"], NORM)
        if view is None or norm is None or graph.calls[norm].args["weight"] is None:
            return None
        if len(graph.function.types[write.outputs[0]].shape) != 4 or 3 in transposed_dims(graph.calls[view]):
            return None
        found[name] = view, norm
    kinds = {
        tuple(graph.calls[norm].args[key] for key in ("eps", "offset", "mul_in_fp32")) for _, norm in found.values()
    }
    return found if len(kinds) == 1 else None


def transposed_dims(call: OpCall) -> set[int]:
    """The two dimensions, of four, that a transposition exchanges."""
    return {dim % 4 for dim in (call.args["dim0"], call.args["dim1"]) if isinstance(dim, int)}
