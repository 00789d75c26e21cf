"""KV writes and attention: GroupQueryAttention over shared past and present buffers, CodedAttention over codes."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.program import Arg, OpCall, Ref

from .emit_norm import rms
from .emit_plain_attention import decoded, plain_attention, scatter
from .emit_rope import cache_tables, rotate
from .emitter import Emitter, emits
from .graph import MICROSOFT, NATIVE

NATIVE_WIDTH = 256
"""The widest heads CachedAttention runs."""
SEQUENCE_LENGTHS, LONGEST = "seqlens_k", "total_sequence_length"


@dataclass(frozen=True)
class Write:
    """A KV write: states before, new rows (before rotation), rotation tables (None: rotated already or none).

    ``k_scale``, ``v_scale``: of states that hold codes.
    """

    call: OpCall
    k_state: Arg
    v_state: Arg
    k: Arg
    v: Arg
    cos: Arg = None
    sin: Arg = None
    interleaved: Arg = False

    @property
    def k_scale(self) -> Arg:
        """(Hk,) fp32."""
        return self.call.args.get("k_scale")

    @property
    def v_scale(self) -> Arg:
        """(Hk,) fp32."""
        return self.call.args.get("v_scale")


@emits("llmopt.attention")
def uncached(e: Emitter, call: OpCall) -> None:
    """Refused: a step without KV state cannot be served."""
    raise e.error(call, "attention without a KV cache", "put rewrite_kv_cache (layout: slots) in the recipe")


@emits("llmopt.kv_write", "llmopt.rope_kv_write")
def kv_write(e: Emitter, call: OpCall) -> None:
    """The attention that reads the states does the write; a rotated q is kept for whoever else reads it."""
    if call.op == "llmopt.rope_kv_write":
        args = call.args
        e.values[call.outputs[0]] = rotate(
            e, e.ref(args["q"]), args["q"], args["cos"], args["sin"], args["interleaved"]
        )


def write_of(e: Emitter, state: Arg) -> Write | None:
    """The write that made a state, with the rotation of k folded in; None for a state as it came in."""
    assert isinstance(state, Ref)
    call = e.producer.get(state.name)
    if call is None:
        return None
    args = call.args
    if call.op == "llmopt.rope_kv_write":
        rotation = args["cos"], args["sin"], args["interleaved"]
        return Write(call, args["k_state"], args["v_state"], args["k"], args["v"], *rotation)
    k = args["k"]
    turn = e.producer.get(k.name) if isinstance(k, Ref) else None
    if turn is not None and turn.op == "llmopt.rope":
        rotation = turn.args["cos"], turn.args["sin"], turn.args["interleaved"]
        return Write(call, args["k_state"], args["v_state"], turn.args["x"], args["v"], *rotation)
    return Write(call, args["k_state"], args["v_state"], k, args["v"])


def query_of(e: Emitter, q: Arg, write: Write) -> Arg:
    """q before the rotation that k has too; raises KeyError-free None when the rotations differ."""
    assert isinstance(q, Ref)
    call = e.producer.get(q.name)
    if write.cos is None or call is None:
        return q
    if call.op == "llmopt.rope_kv_write" and call is write.call:
        return call.args["q"]
    same = call.op == "llmopt.rope" and (write.cos, write.sin, write.interleaved) == tuple(
        call.args[name] for name in ("cos", "sin", "interleaved")
    )
    return call.args["x"] if same else None


def rows(e: Emitter, x: Arg) -> str:
    """x (1, H, T, D) as (1, T, H, D): the source of its transpose where there is one, through a norm if need be."""
    assert isinstance(x, Ref)
    call = e.producer.get(x.name)
    if call is not None and call.op == "aten.transpose.int" and {call.args["dim0"], call.args["dim1"]} == {1, 2}:
        return e.ref(call.args["self"])
    if call is not None and call.op == "llmopt.rms_norm":
        return rms(e, call, rows(e, call.args["x"]))
    return e.graph.node("Transpose", e.ref(x), perm=[0, 2, 1, 3])


def flat(e: Emitter, x: Arg) -> str:
    """x (1, H, T, D) as (1, T, H * D)."""
    _, heads, length, width = e.shape(x)
    return e.reshape(rows(e, x), (1, length, int(heads) * int(width)))


def by_sequence(e: Emitter, name: str, width: int | None) -> str:
    """(1, T, width) rows of equally long pieces as (B, S, width); without a width (1, T) as (B, S)."""
    batch = e.graph.node("Shape", SEQUENCE_LENGTHS)
    shape = e.graph.node("Concat", batch, e.graph.const([-1] if width is None else [-1, width]), axis=0)
    source = e.base.get(name, name)
    return e.graph.node("Reshape", source, shape)


def as_given(e: Emitter, name: str, width: int | None) -> str:
    """Rows as they are: CachedAttention takes the number of sequences from their lengths."""
    return name


@emits("llmopt.cached_attention")
def cached_attention(e: Emitter, call: OpCall) -> None:
    """GroupQueryAttention where it can, else standard operators. The first reader of a state does its write."""
    args = call.args
    if args["ring"]:
        raise e.error(call, "ring states are not supported", "use layout: slots")
    write = write_of(e, args["k_state"])
    if write is None:
        raise e.error(call, "attention over a state that this step did not write is not supported")
    k_final, v_final = write.call.outputs[-2:]
    if k_final in e.values:
        q = flat(e, args["q"])
    else:
        if e.contrib_attention and grouped(e, call, write):
            return
        q = scatter_first(e, call, write)
    keys, values = decoded(e, e.values[k_final], write.k_scale), decoded(e, e.values[v_final], write.v_scale)
    e.set(call, plain_attention(e, call, by_sequence(e, q, flat_width(e, args["q"])), keys, values))


def flat_width(e: Emitter, x: Arg) -> int:
    """H * D of x (1, H, T, D)."""
    return int(e.shape(x)[1]) * int(e.shape(x)[3])


def scatter_first(e: Emitter, call: OpCall, write: Write) -> str:
    """Write the states with TensorScatter; returns q, rotated, as (1, T, H * D)."""
    k = flat(e, write.k)
    if write.cos is not None:
        k = rotate(e, k, write.k, write.cos, write.sin, write.interleaved)
    widths = flat_width(e, write.k), flat_width(e, write.v)
    parts = (by_sequence(e, k, widths[0]), by_sequence(e, flat(e, write.v), widths[1]))
    states, scales = (write.k_state, write.v_state), (write.k_scale, write.v_scale)
    for state, final, part, scale in zip(states, write.call.outputs[-2:], parts, scales):
        e.values[final] = scatter(e, state, part, scale)
    return rotated_query(e, call.args["q"])


def rotated_query(e: Emitter, q: Arg) -> str:
    """q as (1, T, H * D) after its rotation, if any."""
    assert isinstance(q, Ref)
    call = e.producer.get(q.name)
    if call is not None and call.op in ("llmopt.rope", "llmopt.rope_kv_write"):
        x = call.args["x" if call.op == "llmopt.rope" else "q"]
        return rotate(e, flat(e, x), x, call.args["cos"], call.args["sin"], call.args["interleaved"])
    return flat(e, q)


def grouped(e: Emitter, call: OpCall, write: Write) -> bool:
    """Emit CachedAttention, CodedAttention or GroupQueryAttention; False where none has a kernel: heads of other sizes,
    sinks that stay visible, codes outside the native form (GroupQueryAttention of onnxruntime 1.26 refuses them)."""
    args = call.args
    (_, heads, length, width), kv_heads = e.shape(args["q"]), int(e.shape(write.k)[1])
    head = int(width)
    if e.shape(write.k)[3] != e.shape(write.v)[3] or head % 8 or args["sink_tokens"]:
        return False
    dtype, coded = e.type(args["q"]).dtype, write.k_scale is not None
    native = e.native and dtype == "float32" and head <= NATIVE_WIDTH
    if coded and not native:
        return False
    tables = rotation(e, args["q"], write, head, dtype)
    packed = packed_rows(e, (query_of(e, args["q"], write), write.k, write.v)) if tables or write.cos is None else None
    shaped = as_given if native else by_sequence
    if packed:
        data = [shaped(e, packed, (int(heads) + 2 * kv_heads) * head), "", ""]
    else:
        data = [
            shaped(e, n, int(h) * head) for n, h in zip(separate(e, call, write, tables), (heads, kv_heads, kv_heads))
        ]
    window, sinks = int(args["window"]), e.optional(args["sinks"])  # type: ignore[arg-type]
    cos, sin = tables or ("", "")
    positions = shaped(e, e.ref(Ref("position_ids")), None) if tables else ""
    scales = (e.ref(write.k_scale), e.ref(write.v_scale)) if coded else ()
    tail = (SEQUENCE_LENGTHS, LONGEST, cos, sin, positions, "", sinks, *scales)
    last = max(i for i, name in enumerate(tail) if name) + 1
    k_final, v_final = write.call.outputs[-2:]
    names = (f"attention_{len(e.graph.nodes)}", *(f"present_{ref.name}" for ref in (write.k_state, write.v_state)))  # type: ignore[union-attr]
    attributes: dict[str, float | None] = {
        "num_heads": int(heads),
        "kv_num_heads": kv_heads,
        "scale": float(args["scale"]),  # type: ignore[arg-type]
        "softcap": float(args["softcap"]),  # type: ignore[arg-type]
        "local_window_size": window,
        "rotary_interleaved": int(bool(tables and write.interleaved)),
    }
    op, domain = "CodedAttention" if coded else "CachedAttention", NATIVE
    if native:
        e.shapes[names[0]] = (1, length, int(heads) * head)
    else:
        op, domain = "GroupQueryAttention", MICROSOFT
        attributes = {k: v or None for k, v in attributes.items()} | {"do_rotary": int(bool(tables))}
    inputs = (*data, e.ref(write.k_state), e.ref(write.v_state), *tail[:last])
    e.graph.nodes_out(op, inputs, 3, outputs=names, domain=domain, **attributes)
    e.values |= {k_final: names[1], v_final: names[2]}
    e.set(call, e.reshape(names[0], (1, length, int(heads), head)))
    return True


def rotation(e: Emitter, q: Arg, write: Write, head: int, dtype: str) -> tuple[str, str] | None:
    """Cache tables for GroupQueryAttention to rotate with: heads in steps of 16, pairs in steps of 8."""
    if write.cos is None or head % 16 or int(e.shape(write.cos)[2]) % 8 or query_of(e, q, write) is None:
        return None
    return cache_tables(e, write.cos, write.sin, dtype)


def packed_rows(e: Emitter, parts: tuple[Arg, ...]) -> str | None:
    """The (1, T, ·) value that q, k and v are the three parts of, in this order; None if there is none."""
    sources = []
    for part in parts:
        name = part.name if isinstance(part, Ref) else ""
        for op in ("aten.transpose.int", "aten.view.default"):
            call = e.producer.get(name)
            if call is None or call.op not in (op, "aten.reshape.default", "aten._unsafe_view.default"):
                return None
            inner = call.args["self"]
            name = inner.name if isinstance(inner, Ref) else ""
        sources.append(name)
    call = e.producer.get(sources[0])
    whole = call is not None and call.op == "aten.split_with_sizes.default" and call.outputs == tuple(sources)
    return e.ref(call.args["self"]) if whole and call is not None else None


def separate(e: Emitter, call: OpCall, write: Write, tables: tuple[str, str] | None) -> list[str]:
    """q, k and v as (1, T, ·), rotated here unless the attention does it."""
    v = flat(e, write.v)
    if tables or write.cos is None:
        return [flat(e, query_of(e, call.args["q"], write)), flat(e, write.k), v]
    k = rotate(e, flat(e, write.k), write.k, write.cos, write.sin, write.interleaved)
    return [rotated_query(e, call.args["q"]), k, v]
