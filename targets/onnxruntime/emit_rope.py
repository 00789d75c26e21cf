"""Rotary embedding: cos/sin computed in the graph from positions, or cache tables for fused attention."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from llmopt.program import Arg, OpCall, Ref

from .emitter import Emitter, dtype_of, emits
from .readers import materialize


@emits("llmopt.rotary_table")
def rotary_table(e: Emitter, call: OpCall) -> None:
    """cos and sin (1, T, F) in fp32, cast at the end; longrope chooses a table by row."""
    args = call.args
    positions = e.graph.node("Unsqueeze", e.operand(args["positions"], "float32"), e.graph.const([-1]))
    pair = waves(e, positions, args["inv_freq"], args["scale"])
    if args["inv_freq_long"] is not None:
        lengths = args["lengths"]
        if lengths is None:
            raise e.error(call, "a two-table rotary embedding without lengths", "run rewrite_kv_cache")
        longer = e.graph.node("Greater", e.operand(lengths, "int64"), e.operand(args["switch"], "int64"))
        use_long = e.graph.node("Unsqueeze", longer, e.graph.const([-1]))
        other = waves(e, positions, args["inv_freq_long"], args["scale_long"])
        pair = [e.graph.node("Where", use_long, b, a) for a, b in zip(pair, other)]
    dtype = dtype_of(args["dtype"], e.out(call).dtype)
    e.set(call, *(e.cast(name, "float32", dtype) for name in pair))


def waves(e: Emitter, positions: str, inv_freq: Arg, scale: Arg) -> list[str]:
    """cos and sin of positions (1, T, 1) times inv_freq (F,), scaled."""
    angles = e.graph.node("Mul", positions, e.operand(inv_freq, "float32"))
    pair = [e.graph.node(op, angles) for op in ("Cos", "Sin")]
    return pair if scale == 1 else [e.graph.node("Mul", p, e.graph.const(scale, "float32")) for p in pair]


@emits("llmopt.rope")
def rope(e: Emitter, call: OpCall) -> None:
    """RotaryEmbedding of x (1, H, T, D)."""
    args = call.args
    e.set(call, rotate(e, e.ref(args["x"]), args["x"], args["cos"], args["sin"], args["interleaved"]))


def rotate(e: Emitter, name: str, x: Arg, cos: Arg, sin: Arg, interleaved: Arg) -> str:
    """``name``, which holds x (1, H, T, D) in any layout RotaryEmbedding takes, rotated by cos, sin (1, T, F)."""
    heads, width, dtype = e.shape(x)[1], e.shape(x)[3], e.type(x).dtype
    rotated = 2 * int(e.shape(cos)[2])
    attributes: dict[str, Any] = {
        "interleaved": int(bool(interleaved)),
        "rotary_embedding_dim": 0 if rotated == width else rotated,
    }
    tables = (e.operand(cos, dtype), e.operand(sin, dtype))
    return e.graph.node("RotaryEmbedding", name, *tables, num_heads=heads, **attributes)


def cache_tables(e: Emitter, cos: Arg, sin: Arg, dtype: str) -> tuple[str, str] | None:
    """Inputs that hold cos and sin (context, F) by position, filled by the executor at load; None if they cannot.

    They stand in for a rotary_table of the step's own positions with one table: GroupQueryAttention finds a row's
    position from its sequence's length. Tables as inputs take no room in the artifact and are as long as the
    context the executor is loaded for.
    """
    assert isinstance(cos, Ref)
    assert isinstance(sin, Ref)
    call = e.producer.get(cos.name)
    if call is None or call.op != "llmopt.rotary_table" or call.outputs != (cos.name, sin.name):
        return None
    args = call.args
    inv_freq = args["inv_freq"]
    if args["positions"] != Ref("position_ids") or args["inv_freq_long"] is not None:
        return None
    if not isinstance(inv_freq, Ref) or inv_freq.name not in e.readers:
        return None
    key = hashlib.sha256(f"{inv_freq.name} {args['scale']!r} {dtype}".encode()).hexdigest()[:8]
    names = (f"rotary_cos_{key}", f"rotary_sin_{key}")
    if names[0] not in e.tables:
        width, values = e.shape(inv_freq)[0], materialize(e.readers[inv_freq.name]).astype(np.float32).tolist()
        for name, function in zip(names, ("cos", "sin")):
            e.graph.input(name, dtype, ("context", width))
            e.tables[name] = {"function": function, "inv_freq": values, "scale": args["scale"], "dtype": dtype}
    return names
