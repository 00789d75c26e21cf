"""Attention in standard operators, for what GroupQueryAttention has no kernel for."""

from __future__ import annotations

from llmopt.ir.ops.rounding import LIMITS
from llmopt.program import Arg, OpCall, Ref

from .emitter import Emitter
from .graph import onnx_type

TENSOR_SCATTER_OPSET = 24


def scatter(e: Emitter, state: Arg, part: str, scale: Arg) -> str:
    """``part`` (B, S, Hk * D) written behind each sequence's past in ``state`` (B, Hk, C, D), in its buffer: as int8
    codes where there is a ``scale`` (Hk,)."""
    assert isinstance(state, Ref)
    _, heads, _, width = e.shape(state)
    e.graph.opset = max(e.graph.opset, TENSOR_SCATTER_OPSET)
    split = e.graph.node("Reshape", part, e.graph.const([0, 0, heads, width]))
    if scale is not None:
        each = e.graph.node("Reshape", e.ref(scale), e.graph.const([1, 1, -1, 1]))
        values = e.graph.node("Div", e.graph.node("Cast", split, to=onnx_type("float32")), each)
        limits = (e.graph.const(limit, "float32") for limit in (-LIMITS["int8"], LIMITS["int8"]))
        split = e.cast(e.graph.node("Round", e.graph.node("Clip", values, *limits)), "float32", "int8")
    update = e.graph.node("Transpose", split, perm=[0, 2, 1, 3])
    first = e.graph.node("Sub", last_positions(e), e.graph.node("Sub", rows_each(e, part), e.graph.const([1])))
    outputs = (f"present_{state.name}",)
    return e.graph.node("TensorScatter", e.ref(state), update, first, outputs=outputs, axis=2)


def decoded(e: Emitter, state: str, scale: Arg) -> str:
    """A state (B, Hk, C, D) as fp32 numbers, where it holds codes under a ``scale`` (Hk,)."""
    if scale is None:
        return state
    each = e.graph.node("Reshape", e.ref(scale), e.graph.const([1, -1, 1, 1]))
    return e.graph.node("Mul", e.cast(state, "int8", "float32"), each)


def last_positions(e: Emitter) -> str:
    """Position of each sequence's last row, (B,) int64."""
    return e.cast("seqlens_k", "int32", "int64")


def rows_each(e: Emitter, part: str) -> str:
    """S of a (B, S, ·) value, as a vector of one."""
    return e.graph.node("Gather", e.graph.node("Shape", part), e.graph.const([1]), axis=0)


def plain_attention(e: Emitter, call: OpCall, q: str, k_state: str, v_state: str) -> str:
    """cached_attention's result (1, T, H, Dv) from q (B, S, H * D) and states that hold the new rows already.

    Keys past a sequence's end are masked and its values zeroed there: whatever an unwritten slot holds is not read.
    """
    args, g = call.args, e.graph
    _, heads, length, width = (e.shape(args["q"])[i] for i in range(4))
    kv_heads, v_width = int(e.shape(args["k_state"])[1]), int(e.shape(args["v_state"])[3])
    groups = int(heads) // kv_heads
    dtype = e.type(args["q"]).dtype
    rows = rows_each(e, q)
    longest = g.node("Reshape", e.cast("total_sequence_length", "int32", "int64"), g.const([1]))
    zero, one = g.const([0]), g.const([1])
    k, v = (g.node("Slice", s, zero, longest, g.const([2]), one) for s in (k_state, v_state))

    split = g.node("Reshape", q, g.const([0, 0, kv_heads, groups, int(width)]))
    by_head = g.node("Transpose", split, perm=[0, 2, 3, 1, 4])
    merged = g.node("Reshape", by_head, g.const([0, 0, -1, int(width)]))
    scores = g.node("MatMul", merged, g.node("Transpose", k, perm=[0, 1, 3, 2]))
    scores = g.node("Mul", e.cast(scores, dtype, "float32"), g.const(args["scale"], "float32"))
    if args["softcap"]:
        cap = g.const(args["softcap"], "float32")
        scores = g.node("Mul", g.node("Tanh", g.node("Div", scores, cap)), cap)
    tail = g.node("Concat", rows, longest, axis=0)
    shaped = g.node("Concat", g.const([0, kv_heads, groups]), tail, axis=0)
    scores = g.node("Reshape", scores, shaped)
    keys = g.node("Range", g.const(0), g.node("Squeeze", longest), g.const(1))
    scores = g.node("Where", mask(e, args["window"], args["sink_tokens"], rows, keys), scores, infinity(e))
    merged_heads = g.node("Concat", g.const([0, 0, -1]), longest, axis=0)
    probabilities = g.node("Reshape", softmax(e, scores, args["sinks"], kv_heads, groups), merged_heads)
    ends = g.node("Reshape", last_positions(e), g.const([-1, 1, 1, 1]))
    written = g.node("LessOrEqual", g.node("Reshape", keys, g.const([1, 1, -1, 1])), ends)
    v = g.node("Where", written, v, g.const(0, dtype))
    mixed = g.node("MatMul", e.cast(probabilities, "float32", dtype), v)
    apart = g.node("Concat", g.const([0, 0, groups]), rows, g.const([v_width]), axis=0)
    by_row = g.node("Transpose", g.node("Reshape", mixed, apart), perm=[0, 3, 1, 2, 4])
    return e.reshape(by_row, (1, length, int(heads), v_width))


def infinity(e: Emitter) -> str:
    """-inf."""
    return e.graph.const(float("-inf"), "float32")


def mask(e: Emitter, window: Arg, sink_tokens: Arg, rows: str, keys: str) -> str:
    """Which keys (L,) each row sees, (B, 1, 1, S, L)."""
    g = e.graph
    steps = g.node("Range", g.const(0), g.node("Squeeze", rows), g.const(1))
    offsets = g.node("Sub", g.node("Add", steps, g.const(1)), rows)
    ends = g.node("Reshape", last_positions(e), g.const([-1, 1, 1, 1, 1]))
    query = g.node("Add", ends, g.node("Reshape", offsets, g.const([1, 1, 1, -1, 1])))
    seen = g.node("LessOrEqual", keys, query)
    if not window:
        return seen
    near = g.node("Less", g.node("Sub", query, keys), g.const(window))
    if sink_tokens:
        near = g.node("Or", near, g.node("Less", keys, g.const(sink_tokens)))
    return g.node("And", seen, near)


def softmax(e: Emitter, scores: str, sinks: Arg, kv_heads: int, groups: int) -> str:
    """Softmax of (B, Hk, G, S, L) over L, with one extra logit a head that takes weight and gives no value."""
    g = e.graph
    if sinks is None:
        return g.node("Softmax", scores, axis=-1)
    extra = g.node("Reshape", e.operand(sinks, "float32"), g.const([1, kv_heads, groups, 1, 1]))
    one = g.node("Slice", scores, g.const([0]), g.const([1]), g.const([4]))
    wide = g.node("Expand", extra, g.node("Shape", one))
    probabilities = g.node("Softmax", g.node("Concat", scores, wide, axis=-1), axis=-1)
    return g.node("Slice", probabilities, g.const([0]), g.const([-1]), g.const([4]))
