"""Reductions, softmax, sorting."""

from __future__ import annotations

from typing import Any

from llmopt.program import OpCall

from .emit_elementwise import stem
from .emitter import Emitter, axes, axis, emits

REDUCE = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin", "prod": "ReduceProd"}


@emits(
    "aten.sum.dim_IntList", "aten.sum.default", "aten.mean.dim", "aten.mean.default", "aten.amax.default",
    "aten.amin.default", "aten.prod.dim_int",
)  # fmt: skip
def reduce(e: Emitter, call: OpCall) -> None:
    """A reduction in the output's dtype."""
    source = call.args["self"]
    dims = axes(call.args.get("dim"), len(e.shape(source)))
    name = e.operand(source, e.out(call).dtype)
    keep = int(bool(call.args.get("keepdim", False)))
    e.set(call, e.graph.node(REDUCE[stem(call)], name, e.graph.const(dims), keepdims=keep))


@emits("aten.any.dim", "aten.all.dim", "aten.any.default", "aten.all.default")
def quantify(e: Emitter, call: OpCall) -> None:
    """any and all of booleans, as max and min of integers."""
    source = call.args["self"]
    dims = axes(call.args.get("dim"), len(e.shape(source)))
    op = "ReduceMax" if stem(call) == "any" else "ReduceMin"
    keep = int(bool(call.args.get("keepdim", False)))
    whole = e.cast(e.operand(source, "bool"), "bool", "int32")
    e.set(call, e.cast(e.graph.node(op, whole, e.graph.const(dims), keepdims=keep), "int32", "bool"))


@emits("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default")
def softmax(e: Emitter, call: OpCall) -> None:
    """Softmax over an axis; statistics in fp32 whatever the dtype."""
    source, dtype = call.args["self"], e.out(call).dtype
    dim = axis(call.args["dim"], len(e.shape(source)))
    op = "LogSoftmax" if "log" in call.op else "Softmax"
    e.set(call, e.cast(e.graph.node(op, e.operand(source, "float32"), axis=dim), "float32", dtype))


@emits("aten.topk.default")
def topk(e: Emitter, call: OpCall) -> None:
    """Largest (or smallest) values and their indices."""
    source = call.args["self"]
    dim = axis(call.args["dim"], len(e.shape(source)))
    count = e.graph.const([call.args["k"]]) if isinstance(call.args["k"], int) else e.dims((call.args["k"],), False)
    order: dict[str, Any] = {"largest": int(bool(call.args["largest"])), "sorted": int(bool(call.args["sorted"]))}
    e.set(call, *e.graph.nodes_out("TopK", (e.ref(source), count), 2, axis=dim, **order))


@emits("aten.sort.default", "aten.argsort.default")
def sort(e: Emitter, call: OpCall) -> None:
    """A full sort is TopK of the whole axis."""
    source = call.args["self"]
    dim = axis(call.args["dim"], len(e.shape(source)))
    count = e.dims((e.shape(source)[dim],), False)
    descending = int(bool(call.args["descending"]))
    pair = e.graph.nodes_out("TopK", (e.ref(source), count), 2, axis=dim, largest=descending, sorted=1)
    e.set(call, *(pair if stem(call) == "sort" else pair[1:]))


@emits("aten.argmax.default", "aten.argmin.default")
def argmax(e: Emitter, call: OpCall) -> None:
    """Index of the first largest (smallest) element of an axis."""
    source, dim = call.args["self"], call.args["dim"]
    if dim is None:
        raise e.error(call, f"{stem(call)} over all axes")
    op = "ArgMax" if stem(call) == "argmax" else "ArgMin"
    rank = len(e.shape(source))
    e.set(call, e.graph.node(op, e.ref(source), axis=axis(dim, rank), keepdims=int(bool(call.args["keepdim"]))))


@emits("aten.max.dim", "aten.min.dim")
def extreme(e: Emitter, call: OpCall) -> None:
    """Values and first indices of the extreme of an axis."""
    source = call.args["self"]
    dim = axis(call.args["dim"], len(e.shape(source)))
    keep = int(bool(call.args["keepdim"]))
    value, place = ("ReduceMax", "ArgMax") if stem(call) == "max" else ("ReduceMin", "ArgMin")
    name = e.ref(source)
    values = e.graph.node(value, name, e.graph.const([dim]), keepdims=keep)
    e.set(call, values, e.graph.node(place, name, axis=dim, keepdims=keep))


@emits("aten.cumsum.default")
def cumsum(e: Emitter, call: OpCall) -> None:
    """Running sum of an axis."""
    source = call.args["self"]
    dim = axis(call.args["dim"], len(e.shape(source)))
    e.set(call, e.graph.node("CumSum", e.operand(source, e.out(call).dtype), e.graph.const(dim)))
