"""Linears that multiply codes by codes, weights and activations rounded to one format of eight bits: which do, and the
rules that join the making of the codes with what is before it.

- ``cuda.linear_8``: a linear over codes ``x``, of the format ``round``, with ``x_scale``: its rows' scales, or the
  static ``input_scale``. ``interval``, absent for ``INTERVAL``: how many columns' FP8 products the tensor cores sum.
- ``cuda.round``: codes, and unless ``scale`` is static their scales, of the rows of ``x`` or of their gated activation.
- ``cuda.norm_round``: the same of what the call ``op`` makes, a normalization, whose sum, if it adds, comes second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from llmopt.program import Arg, Function, OpCall, Ref, TensorType, eval_shape

from .graph import Graph

QUANTIZED, ROUND = "llmopt.linear_q", "llmopt.round_activations"
LINEAR_8, ROUNDED, NORM_ROUNDED = "cuda.linear_8", "cuda.round", "cuda.norm_round"
FORMATS = {"int8": "int", "fp8_e4m3": "fp8_e4m3"}
"""Format of the weights that each format of activations meets in the tensor cores."""
CODES = {"int8": "int8", "fp8_e4m3": "float8_e4m3fn"}
"""Type of an activation's codes."""
NORMS = ("llmopt.rms_norm", "llmopt.add_rms_norm", "aten.layer_norm.default", "llmopt.add_layer_norm")
NOTHING_JOINED = {"gate": None, "residual": None}
INTERVAL = 128
"""Columns of FP8 codes whose products the tensor cores sum before the sum is added in fp32, where ``interval`` does not
say otherwise: those of sm_90 keep some 14 bits of a sum."""
ALL_COLUMNS = 0
"""The interval of fast accumulation: the tensor cores sum all of K."""
FEW_BITS = (90,)
"""Architectures whose tensor cores sum FP8 products in fewer bits than fp32 and whose kernels can take the sums out."""
ACCURATE_ROWS = 128
"""Rows up to which fast accumulation saves no time: on an H200 a step of 128 sequences of an 8B model takes 6.5 ms with
it and 5.8 without, where ``gemm_ring`` serves; one of 256 9.2 and 10.5."""


def code_calls(function: Function) -> dict[int, str]:
    """The codes of each call, by its index, that multiplies its input's codes by its weight's."""
    made = {name: call for call in function.calls for name in call.outputs}
    found = {}
    for index, call in enumerate(function.calls):
        codes = call.args.get("codes")
        if isinstance(codes, Ref) and multiplies_codes(call, made):
            found[index] = codes.name
    return found


def multiplies_codes(call: OpCall, made: Mapping[str, OpCall]) -> bool:
    """Whether a call is a linear over symmetric codes of eight bits whose input is rounded to the same format.

    ``made``: who makes each value. Other linears multiply the rounded numbers.
    """
    x = call.args.get("x")
    rounding = made.get(x.name) if isinstance(x, Ref) else None
    if call.op != QUANTIZED or rounding is None or rounding.op != ROUND:
        return False
    v = call.args
    same = FORMATS[str(rounding.args["format"])] == v["format"] and v["bits"] == 8
    return same and v["zeros"] is None and v["g_idx"] is None


def runs_codes(arch: int) -> Callable[[str], bool]:
    """Which formats of activations an architecture's tensor cores multiply: FP8 from sm_89 on."""
    return lambda format: format == "int8" or arch >= 89


def codes_into_linears(graph: Graph, at: int, call: OpCall, runs: Callable[[str], bool]) -> None:
    """Rounded activations that nothing but linears over codes of the same format read: the linears take the codes."""
    if call.op != ROUND or not runs(str(call.args["format"])):
        return
    (name,) = call.outputs
    readers, takers = graph.readers.get(name, []), code_calls(graph.function)
    if not readers or graph.uses[name] != len(readers) or not set(readers) <= takers.keys():
        return
    static: Arg = call.args["scale"]
    scale, kind = static, graph.function.types[name]
    outputs: tuple[str, ...] = (name,)
    graph.types[name] = replace(kind, dtype=CODES[str(call.args["format"])])
    if static is None:
        scale, outputs = Ref(f"{name}/scale"), (name, f"{name}/scale")
        graph.types[outputs[1]] = TensorType(kind.shape[:-1], "float32")
    graph.places[at] = (replace(call, op=ROUNDED, args={**call.args, "gate": None}, outputs=outputs),)
    for i in readers:
        reader = graph.calls[i]
        kept = {key: arg for key, arg in reader.args.items() if key not in ("x", "zeros", "g_idx")}
        taken = {"x": Ref(name), "x_scale": scale, "input_scale": static, "round": call.args["format"]}
        graph.places[i] = (replace(reader, op=LINEAR_8, args={**taken, **kept, **NOTHING_JOINED}),)


def norm_into_rounding(graph: Graph, at: int, call: OpCall) -> None:
    """A normalization and the rounding of its result, which nothing else reads."""
    source = graph.only_from(call.args["x"], *NORMS) if call.op == ROUNDED and call.args["gate"] is None else None
    if source is None or call.args["x"] != Ref(graph.calls[source].outputs[0]):
        return
    norm = graph.calls[source]
    args = {**norm.args, "op": norm.op, "input_scale": call.args["scale"], "round": call.args["format"]}
    outputs = (call.outputs[0], *norm.outputs[1:], *call.outputs[1:])
    graph.places[source] = (OpCall(NORM_ROUNDED, args, outputs, call.scope),)
    graph.places[at] = ()


def gate_into_rounding(graph: Graph, at: int, call: OpCall) -> None:
    """A gated activation that no linear took, and the rounding of its result, which nothing else reads."""
    joins = call.op == ROUNDED and call.args["gate"] is None
    source = graph.only_from(call.args["x"], "llmopt.gated_activation") if joins else None
    if source is not None:
        gate = graph.calls[source].args
        args: dict[str, Any] = {**call.args, "x": gate["x"], "gate": gate["kind"]}
        graph.places[source], graph.places[at] = (), (replace(call, args=args),)


def fast_accumulation(graph: Graph, at: int, call: OpCall, dims: Mapping[str, int]) -> None:
    """A linear of many rows over FP8 codes with a scale a channel or tensor: the tensor cores sum all of K."""
    v: Any = call.args
    if call.op != LINEAR_8 or v["round"] != "fp8_e4m3":
        return
    *rows, k = eval_shape(graph.function.types[v["x"].name].shape, dims)
    if prod(rows) > ACCURATE_ROWS and v["block_k"] >= k:
        graph.places[at] = (replace(call, args={**call.args, "interval": ALL_COLUMNS}),)
