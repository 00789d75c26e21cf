"""Ops that move or index data: views, slices, concatenation, gathers, creation."""

from __future__ import annotations

from typing import Any

from llmopt.program import Arg, DimExpr, OpCall

from .emitter import Emitter, axis, emits

END = 2**62


@emits(
    "aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.flatten.using_ints",
    "aten.unflatten.int", "aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default", "aten.unsqueeze.default",
)  # fmt: skip
def view(e: Emitter, call: OpCall) -> None:
    """Reshape to the output's recorded shape."""
    source = call.args["self"]
    same = e.shape(source) == e.out(call).shape
    e.set(call, e.ref(source) if same else e.reshape(e.ref(source), e.out(call).shape))


@emits("aten.transpose.int", "aten.t.default", "aten.permute.default", "aten.movedim.int")
def transpose(e: Emitter, call: OpCall) -> None:
    """Transpose by an explicit permutation."""
    source = call.args["self"]
    rank = len(e.shape(source))
    perm = list(range(rank))
    match call.op:
        case "aten.permute.default":
            dims = call.args["dims"]
            assert isinstance(dims, tuple)
            perm = [axis(d, rank) for d in dims]
        case "aten.movedim.int":
            perm.insert(axis(call.args["destination"], rank), perm.pop(axis(call.args["source"], rank)))
        case _ if rank >= 2:
            a, b = axis(call.args.get("dim0", 0), rank), axis(call.args.get("dim1", 1), rank)
            perm[a], perm[b] = perm[b], perm[a]
    e.set(call, e.graph.node("Transpose", e.ref(source), perm=perm))


def bound(e: Emitter, value: Arg, default: int) -> str:
    """A slice bound as a one-element vector."""
    if isinstance(value, DimExpr):
        return e.graph.node("Reshape", e.scalar(value), e.graph.const([1]))
    return e.graph.const([default if value is None else min(int(value), END)])  # type: ignore[arg-type]


@emits("aten.slice.Tensor", "aten.narrow.default")
def slice_(e: Emitter, call: OpCall) -> None:
    """A strided range of one axis."""
    source = call.args["self"]
    dim = axis(call.args["dim"], len(e.shape(source)))
    start, stop = call.args["start"], call.args.get("end")
    if "length" in call.args:
        length = call.args["length"]
        if not isinstance(start, int) or not isinstance(length, int):
            raise e.error(call, "narrow with symbolic bounds")
        stop = start + length
    step = e.graph.const([call.args.get("step", 1)])
    if e.out(call).shape == e.shape(source) and call.args.get("step", 1) == 1:
        e.set(call, e.ref(source))
        return
    bounds = (bound(e, start, 0), bound(e, stop, END))
    e.set(call, e.graph.node("Slice", e.ref(source), *bounds, e.graph.const([dim]), step))


@emits("aten.select.int")
def select(e: Emitter, call: OpCall) -> None:
    """One index of an axis, which disappears."""
    source, index = call.args["self"], call.args["index"]
    dim = axis(call.args["dim"], len(e.shape(source)))
    e.set(call, e.graph.node("Gather", e.ref(source), e.operand(index, "int64"), axis=dim))


@emits("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(e: Emitter, call: OpCall) -> None:
    """Broadcast to the output's shape."""
    source = call.args["self"]
    same = e.shape(source) == e.out(call).shape
    e.set(call, e.ref(source) if same else e.graph.node("Expand", e.ref(source), e.dims(e.out(call).shape, False)))


@emits("aten.repeat.default")
def repeat(e: Emitter, call: OpCall) -> None:
    """Tile; leading axes are added first."""
    source, repeats = call.args["self"], call.args["repeats"]
    assert isinstance(repeats, tuple)
    shape = (1,) * (len(repeats) - len(e.shape(source))) + e.shape(source)
    sized = e.ref(source) if shape == e.shape(source) else e.reshape(e.ref(source), shape)
    e.set(call, e.graph.node("Tile", sized, e.dims(repeats, False)))


@emits("aten.repeat_interleave.self_int")
def repeat_interleave(e: Emitter, call: OpCall) -> None:
    """Each index of an axis ``repeats`` times in a row."""
    source, times = call.args["self"], call.args["repeats"]
    shape = list(e.shape(source))
    dim = axis(call.args["dim"], len(shape))
    wide = e.graph.node("Unsqueeze", e.ref(source), e.graph.const([dim + 1]))
    reps: list[Arg] = [1] * (len(shape) + 1)
    reps[dim + 1] = times
    e.set(call, e.reshape(e.graph.node("Tile", wide, e.dims(reps, False)), e.out(call).shape))


@emits("aten.cat.default", "aten.stack.default")
def concat(e: Emitter, call: OpCall) -> None:
    """Concat; stack adds the axis first."""
    tensors = call.args["tensors"]
    assert isinstance(tensors, tuple)
    dim = axis(call.args["dim"], len(e.out(call).shape))
    names = [e.operand(t, e.out(call).dtype) for t in tensors]
    if call.op == "aten.stack.default":
        names = [e.graph.node("Unsqueeze", n, e.graph.const([dim])) for n in names]
    e.set(call, e.graph.node("Concat", *names, axis=dim))


@emits(
    "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int", "aten.split.sizes",
)  # fmt: skip
def split(e: Emitter, call: OpCall) -> None:
    """Split by the extents of the outputs; unbind drops the axis."""
    source = call.args["self"]
    dim = axis(call.args["dim"], len(e.shape(source)))
    unbind = call.op == "aten.unbind.int"
    sizes: list[Any] = [1 if unbind else e.out(call, i).shape[dim] for i in range(len(call.outputs))]
    if len(sizes) == 1 and not unbind:
        e.set(call, e.ref(source))
        return
    parts = e.graph.nodes_out("Split", (e.ref(source), e.dims(sizes, False)), len(sizes), axis=dim)
    if unbind:
        parts = tuple(e.reshape(p, e.out(call, i).shape) for i, p in enumerate(parts))
    e.set(call, *parts)


@emits("aten.embedding.default")
def embedding(e: Emitter, call: OpCall) -> None:
    """Rows of a table."""
    e.set(call, e.graph.node("Gather", e.ref(call.args["weight"]), e.ref(call.args["indices"]), axis=0))


@emits("aten.index_select.default")
def index_select(e: Emitter, call: OpCall) -> None:
    """Rows of an axis by a vector of indices."""
    source = call.args["self"]
    dim = axis(call.args["dim"], len(e.shape(source)))
    e.set(call, e.graph.node("Gather", e.ref(source), e.ref(call.args["index"]), axis=dim))


@emits("aten.index.Tensor")
def index(e: Emitter, call: OpCall) -> None:
    """Indexing by one integer tensor, or by integer tensors on the leading axes."""
    source, indices = call.args["self"], call.args["indices"]
    assert isinstance(indices, tuple)
    given = [(i, a) for i, a in enumerate(indices) if a is not None]
    if any(e.type(a).dtype == "bool" for _, a in given):
        raise e.error(call, "indexing by a boolean mask has a shape that depends on data")
    if len(given) == 1:
        dim, only = given[0]
        e.set(call, e.graph.node("Gather", e.ref(source), e.ref(only), axis=dim))
        return
    if [i for i, _ in given] != list(range(len(given))):
        raise e.error(call, "indexing by tensors on axes that are not the leading ones")
    parts = [e.operand(a, "int64") for _, a in given]
    wide = [e.graph.node("Unsqueeze", p, e.graph.const([-1])) for p in broadcast(e, parts)]
    e.set(call, e.graph.node("GatherND", e.ref(source), e.graph.node("Concat", *wide, axis=-1)))


def broadcast(e: Emitter, names: list[str]) -> list[str]:
    """Values broadcast to one shape."""
    shape = names[0]
    for name in names[1:]:
        shape = e.graph.node("Add", e.graph.node("Mul", shape, e.graph.const(0)), name)
    target = e.graph.node("Shape", shape)
    return [e.graph.node("Expand", n, target) for n in names]


@emits("aten.gather.default")
def gather(e: Emitter, call: OpCall) -> None:
    """Elements of an axis by an index of the result's shape."""
    source = call.args["self"]
    dim = axis(call.args["dim"], len(e.shape(source)))
    e.set(call, e.graph.node("GatherElements", e.ref(source), e.ref(call.args["index"]), axis=dim))


@emits("aten.scatter.src", "aten.scatter.value", "aten.scatter_add.default")
def scatter(e: Emitter, call: OpCall) -> None:
    """Elements written (or added) along an axis."""
    source, where, dtype = call.args["self"], call.args["index"], e.out(call).dtype
    dim = axis(call.args["dim"], len(e.shape(source)))
    if "value" in call.args:
        value = e.operand(call.args["value"], dtype)
        updates = e.graph.node("Expand", value, e.graph.node("Shape", e.ref(where)))
    else:
        updates = e.operand(call.args["src"], dtype)
        if e.shape(call.args["src"]) != e.shape(where):
            raise e.error(call, "scatter whose source is larger than its index")
    reduction = "add" if call.op == "aten.scatter_add.default" else None
    base = e.operand(source, dtype)
    e.set(call, e.graph.node("ScatterElements", base, e.ref(where), updates, axis=dim, reduction=reduction))


@emits(
    "aten.full.default", "aten.zeros.default", "aten.ones.default", "aten.full_like.default", "aten.zeros_like.default",
    "aten.ones_like.default", "aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default",
    "aten.scalar_tensor.default", "aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default",
)  # fmt: skip
def fill(e: Emitter, call: OpCall) -> None:
    """A constant tensor; uninitialized ones are zero."""
    fallback = 1 if "ones" in call.op else 0
    value = call.args.get("fill_value", call.args.get("s", fallback))
    constant = e.operand(value, e.out(call).dtype)
    shape = e.out(call).shape
    e.set(call, constant if shape == () else e.graph.node("Expand", constant, e.dims(shape, False)))


@emits("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(e: Emitter, call: OpCall) -> None:
    """Range in the output's dtype."""
    dtype = e.out(call).dtype
    start, step = call.args.get("start", 0), call.args.get("step", 1)
    e.set(call, e.graph.node("Range", *(e.operand(a, dtype) for a in (start, call.args["end"], step))))
