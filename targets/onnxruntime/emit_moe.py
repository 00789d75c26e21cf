"""Mixture of experts: the contrib MoE operator where it computes the same, else dense over the experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmopt.program import Arg, OpCall, Ref, TensorType

from .emit_elementwise import activate
from .emitter import Emitter, emits
from .graph import MICROSOFT
from .readers import Array, Derived

OAI: dict[str, Any] = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0}
SILU: dict[str, Any] = {"activation_alpha": 1.0, "activation_beta": 0.0}
UNCHOSEN = -1e30


@emits("llmopt.moe_experts")
def moe_experts(e: Emitter, call: OpCall) -> None:
    """MoE for silu and swiglu_oai experts in float32; other activations run every expert on every row."""
    kind = str(call.args["activation"])
    fused = kind in ("silu", "swiglu_oai") and e.out(call).dtype == "float32"
    e.set(call, contrib(e, call, kind) if fused else dense(e, call, kind))


def contrib(e: Emitter, call: OpCall, kind: str) -> str:
    """MoE picks experts by softmax(router): log-weights of the chosen experts, scaled back by the weights' sum.

    Shifting by the sum keeps any routing weights, normalized or not; they must be positive, as a weight of zero
    adds nothing either way.
    """
    args, g = call.args, e.graph
    k = int(e.shape(args["index"])[1])
    weights = e.operand(args["weight"], "float32")
    tiny = g.const(np.finfo(np.float32).tiny, "float32")
    total = g.node("Max", g.node("ReduceSum", weights, g.const([-1]), keepdims=1), tiny)
    logs = g.node("Log", g.node("Max", weights, tiny))
    router = spread(e, call, logs, UNCHOSEN)
    apart = kind == "silu"
    inputs = [e.ref(args["x"]), router, *gate_up(e, args, apart), e.ref(args["down"]), e.optional(args["down_bias"])]
    attributes = SILU if apart else OAI
    shared: dict[str, Any] = {"k": k, "activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 1}
    return g.node("Mul", g.node("MoE", *inputs, domain=MICROSOFT, **shared, **attributes), total)


def spread(e: Emitter, call: OpCall, values: str, empty: float) -> str:
    """Per-choice values (T, k) as (T, E), ``empty`` for experts that were not chosen."""
    index = call.args["index"]
    experts = int(e.shape(call.args["gate_up" if "gate_up" in call.args else "gate_up_codes"])[0])
    rows = e.shape(index)[0]
    base = e.graph.node("Expand", e.graph.const(empty, "float32"), e.dims((rows, experts), False))
    return e.graph.node("ScatterElements", base, e.operand(index, "int64"), values, axis=1)


def gate_up(e: Emitter, args: dict[str, Arg], apart: bool) -> list[str]:
    """fc1 weight and bias with gate and up rows interleaved, the only order the CPU kernel takes."""
    weight, bias = args["gate_up"], args["gate_up_bias"]
    if not apart:
        return [e.ref(weight), e.optional(bias)]
    return [interleaved(e, weight), "" if bias is None else interleaved(e, bias)]


def interleaved(e: Emitter, weight: Arg) -> str:
    """A weight with the rows of gate and up interleaved, as a weight of its own."""
    assert isinstance(weight, Ref)
    type_ = TensorType(e.shape(weight), e.type(weight).dtype)
    return e.graph.weight(f"{weight.name}.interleaved", Derived(e.readers[weight.name], type_, interleave_rows))


def interleave_rows(values: Array) -> Array:
    """(n, 2I, …) with rows g0, u0, g1, u1, … in place of g0, g1, …, u0, u1, …"""
    count, rows = values.shape[:2]
    halves = values.reshape(count, 2, rows // 2, *values.shape[2:])
    return np.ascontiguousarray(np.moveaxis(halves, 1, 2)).reshape(values.shape)


def dense(e: Emitter, call: OpCall, kind: str) -> str:
    """Every expert on every row, weighted by a routing matrix that is zero where an expert was not chosen."""
    args, g, dtype = call.args, e.graph, e.out(call).dtype
    x = g.node("Unsqueeze", e.ref(args["x"]), g.const([0]))
    hidden = expert_linear(e, x, args["gate_up"], args["gate_up_bias"])
    value = expert_linear(e, gate(e, hidden, kind, call), args["down"], args["down_bias"])
    router = spread(e, call, e.operand(args["weight"], "float32"), 0.0)
    by_expert = g.node("Unsqueeze", g.node("Transpose", router, perm=[1, 0]), g.const([-1]))
    weighted = g.node("Mul", e.cast(value, dtype, "float32"), by_expert)
    return e.cast(g.node("ReduceSum", weighted, g.const([0]), keepdims=0), "float32", dtype)


def expert_linear(e: Emitter, x: str, weight: Arg, bias: Arg) -> str:
    """x (1 or E, T, K) times each expert's (N, K), plus its bias."""
    transposed = e.graph.node("Transpose", e.ref(weight), perm=[0, 2, 1])
    product = e.graph.node("MatMul", x, transposed)
    if bias is None:
        return product
    return e.graph.node("Add", product, e.graph.node("Unsqueeze", e.ref(bias), e.graph.const([1])))


def gate(e: Emitter, hidden: str, kind: str, call: OpCall) -> str:
    """The experts' gated activation of (E, T, 2I)."""
    g, width = e.graph, int(e.shape(call.args["gate_up"])[1])
    if kind != "swiglu_oai":
        halves = g.nodes_out("Split", (hidden, g.const([width // 2, width // 2])), 2, axis=-1)
        return g.node("Mul", activate(e, halves[0], kind), halves[1])
    dtype = e.out(call).dtype
    end, two, last = g.const([2**62]), g.const([2]), g.const([-1])
    glu, up = (g.node("Slice", hidden, g.const([i]), end, last, two) for i in (0, 1))
    limit, low = g.const(7.0, dtype), g.const(-7.0, dtype)
    glu, up = g.node("Min", glu, limit), g.node("Max", g.node("Min", up, limit), low)
    gated = g.node("QuickGelu", glu, domain=MICROSOFT, alpha=1.702)
    return g.node("Mul", g.node("Add", up, g.const(1.0, dtype)), gated)
