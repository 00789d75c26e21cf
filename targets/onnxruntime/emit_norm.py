"""Normalizations, alone and fused with the residual addition."""

from __future__ import annotations

import numpy as np

from llmopt.program import Arg, OpCall, Ref, TensorType

from .emitter import Emitter, emits
from .graph import MICROSOFT, NATIVE
from .readers import Derived


def gamma(e: Emitter, weight: Arg, offset: Arg, width: int, dtype: str) -> str:
    """The multiplier (C,): weight plus offset as a weight of its own, or ones."""
    if weight is None:
        return e.graph.const(np.ones(width), dtype)
    if not offset:
        return e.operand(weight, dtype)
    assert isinstance(weight, Ref)
    if weight.name not in e.readers or e.type(weight).dtype != dtype:
        return e.graph.node("Add", e.operand(weight, dtype), e.graph.const(offset, dtype))
    reader = e.readers[weight.name]
    shifted = Derived(reader, TensorType(e.shape(weight), dtype), lambda w: w + w.dtype.type(offset))
    return e.graph.weight(f"{weight.name}.plus_{offset:g}", shifted)


@emits("llmopt.rms_norm")
def rms_norm(e: Emitter, call: OpCall) -> None:
    """RMSNormalization over the last axis."""
    e.set(call, rms(e, call, e.ref(call.args["x"])))


def rms(e: Emitter, call: OpCall, x: str) -> str:
    """The norm of a rms_norm call applied to ``x``, a value with the same last axis."""
    out, args = e.out(call), call.args
    scale = gamma(e, args["weight"], args["offset"], int(out.shape[-1]), out.dtype)
    return e.graph.node("RMSNormalization", x, scale, axis=-1, epsilon=float(args["eps"]), stash_type=1)  # type: ignore[arg-type]


@emits("llmopt.add_rms_norm")
def add_rms_norm(e: Emitter, call: OpCall) -> None:
    """AddRmsNorm, or SkipSimplifiedLayerNormalization, whose fourth output is the sum."""
    out, args = e.out(call), call.args
    scale = gamma(e, args["weight"], args["offset"], int(out.shape[-1]), out.dtype)
    inputs = (e.operand(args["x"], out.dtype), e.operand(args["residual"], out.dtype), scale)
    if e.native and out.dtype == "float32" and e.shape(args["x"]) == e.shape(args["residual"]):
        e.set(call, *e.graph.nodes_out("AddRmsNorm", inputs, 2, domain=NATIVE, epsilon=float(args["eps"])))  # type: ignore[arg-type]
        return
    e.set(call, *skip(e, "SkipSimplifiedLayerNormalization", inputs, args["eps"]))


def skip(e: Emitter, op: str, inputs: tuple[str, ...], eps: Arg) -> tuple[str, str]:
    """A skip normalization: (normed, sum)."""
    stem = f"{op}_{len(e.graph.nodes)}"
    names = (stem, "", "", f"{stem}_sum")
    e.graph.nodes_out(op, inputs, 4, outputs=names, domain=MICROSOFT, epsilon=float(eps))  # type: ignore[arg-type]
    return names[0], names[3]


@emits("aten.layer_norm.default", "aten.native_layer_norm.default")
def layer_norm(e: Emitter, call: OpCall) -> None:
    """LayerNormalization over the trailing axes."""
    out, args = e.out(call), call.args
    shape = args["normalized_shape"]
    assert isinstance(shape, tuple)
    weight, bias = args["weight"], args["bias"]
    scale = e.graph.const(np.ones(shape), out.dtype) if weight is None else e.operand(weight, out.dtype)
    inputs = [e.operand(args["input"], out.dtype), scale] + ([] if bias is None else [e.operand(bias, out.dtype)])
    if call.op == "aten.layer_norm.default":
        e.set(call, e.graph.node("LayerNormalization", *inputs, axis=-len(shape), epsilon=float(args["eps"])))  # type: ignore[arg-type]
    else:
        e.set(call, *e.graph.nodes_out("LayerNormalization", inputs, 3, axis=-len(shape), epsilon=float(args["eps"])))  # type: ignore[arg-type]


@emits("llmopt.add_layer_norm")
def add_layer_norm(e: Emitter, call: OpCall) -> None:
    """SkipLayerNormalization; its fourth output is the sum."""
    out, args = e.out(call), call.args
    scale = gamma(e, args["weight"], 0, int(out.shape[-1]), out.dtype)
    inputs = [e.operand(args["x"], out.dtype), e.operand(args["residual"], out.dtype), scale]
    if args["bias"] is not None:
        inputs.append(e.operand(args["bias"], out.dtype))
    e.set(call, *skip(e, "SkipLayerNormalization", tuple(inputs), args["eps"]))
