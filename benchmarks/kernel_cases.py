"""Cases of the kernel benchmark: a call of a real model's shape, and the configurations worth timing for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmopt.program import OpCall
from targets.cuda.kernel import CallSite, Selection, Strided
from targets.cuda.kernels import attention, embedding, gate, gemm, gemm_persistent, gemv, norm, rotary

MODELS = {
    "llama-3.1-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
                     "head": (128256, 4096)},
    "llama-3.2-1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192),
                     "head": (128256, 2048)},
    "qwen3-0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072),
                   "head": (151936, 1024)},
}  # fmt: skip
GEMV = [(1, 1024, 4), (1, 2048, 4), (1, 2048, 8), (2, 1024, 4), (2, 2048, 8), (1, 4096, 8), (1, 4096, 16), (4, 1024, 8)]


@dataclass(frozen=True)
class Case:
    """A call and one configuration of the kernel that serves it. ``data``: integer inputs by buffer name;
    ``rotating``: buffers that each launch takes from another place, so that no cache holds them."""

    model: str
    what: str
    kernel: str
    key: str
    config: dict[str, Any]
    selection: Selection
    values: dict[str, Any]
    data: dict[str, list[int]]
    rotating: tuple[str, ...]
    bytes: int
    flops: int
    outputs: tuple[Strided, ...] = ()

    @property
    def selection_call(self) -> OpCall:
        """The call that scratch buffers are named after."""
        return OpCall("case", {}, ("out",))


def dense(name: str, dtype: str, *shape: int) -> Strided:
    """A row-major tensor in a buffer of its own."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * extent)
    return Strided(name, dtype, shape, tuple(reversed(strides)))


def site(op: str, values: dict[str, Any], outputs: tuple[Strided, ...], dims: dict[str, int], **more: Any) -> CallSite:
    """A call of a bucket, as the planner would describe it."""
    call = OpCall(op, {}, tuple(o.buffer for o in outputs))
    fields = {"function": "decode", "arch": 90, "tuning": {}, **more}
    return CallSite(call, {}, values, outputs, dims, **fields)


def linear(model: str, what: str, m: int, n: int, k: int, kernel: Any, config: dict[str, Any] | None) -> Case | None:
    """A linear layer of m rows by one kernel in one configuration (None: its own choice)."""
    x, w, out = dense("x", "bfloat16", 1, m, k), dense("weight", "bfloat16", n, k), dense("out", "bfloat16", 1, m, n)
    key = f"bfloat16 {m}x{n}x{k}"
    tuning = {kernel.name: {key: config}} if config else {}
    values = {"input": x, "weight": w, "bias": None}
    found = kernel.select(site("aten.linear.default", values, (out,), {"T": m}, tuning=tuning))
    if isinstance(found, str):
        return None
    moved = 2 * (n * k + m * k + m * n)
    return Case(model, what, kernel.name, key, config or {}, found, values, {}, ("weight",), moved, 2 * m * n * k,
                (out,))  # fmt: skip


def linears(model: str, rows: tuple[int, ...]) -> Iterator[Case | None]:
    """Every linear of a model at some numbers of rows, in the configurations worth trying."""
    for what, (n, k) in MODELS[model].items():
        for m in rows:
            if m == 1:
                for r, block, warps in GEMV:
                    if block <= max(k, 1024):
                        yield linear(model, what, m, n, k, gemv.KERNEL, {"rows": r, "block": block, "warps": warps})
                continue
            if what == "head" and m > 256:
                continue
            for config in tiles(m, n, k):
                yield linear(model, what, m, n, k, gemm.KERNEL, config)
            if m >= 128:
                for bm, bn, parts, stages in ((128, 256, 2, 3), (128, 128, 1, 4)):
                    config = {"BM": bm, "BN": bn, "BK": 64, "GROUP": 8, "PARTS": parts, "warps": 8, "stages": stages}
                    yield linear(model, what, m, n, k, gemm_persistent.KERNEL, config)


def tiles(m: int, n: int, k: int) -> Iterator[dict[str, int]]:
    """Configurations of the tiled kernel whose programs number between 0.75 and 6 a multiprocessor."""
    if m <= 64:
        bm = max(16, 1 << (m - 1).bit_length())
        shapes = [
            (bm, 64, 128, 1, 4, 3), (bm, 64, 128, 1, 4, 4), (bm, 64, 64, 1, 4, 6), (bm, 64, 256, 1, 4, 3),
            (bm, 128, 128, 1, 4, 4), (bm, 128, 128, 1, 4, 3), (bm, 64, 256, 1, 4, 2),
        ]  # fmt: skip
        splits: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    elif m <= 128:
        shapes = [(128, 64, 128, 0, 4, 4), (128, 64, 64, 0, 4, 5), (128, 128, 64, 0, 8, 4)]
        splits = (1, 2, 3, 4)
    elif m <= 512:
        shapes = [(128, 128, 64, 0, 8, 5), (256, 128, 64, 0, 8, 4), (256, 64, 64, 0, 8, 4), (128, 64, 64, 0, 4, 4)]
        splits = (1, 2, 3)
    else:
        return
    for bm, bn, bk, swap, warps, stages in shapes:
        for split in splits:
            programs = -(-n // bn) * -(-m // bm) * split
            if 96 <= programs <= 400 + 400 * (split == 1) and -(-k // split) >= 2 * bk:
                yield {"BM": bm, "BN": bn, "BK": bk, "SPLIT": split, "SWAP": swap, "warps": warps, "stages": stages,
                       "AHEAD": 256 if m <= 64 else 0}  # fmt: skip


def attentions() -> Iterator[Case]:
    """Decode at several batches and contexts, and prefill, of the 8B shape; blocks of 16 tokens and of 64."""
    for batch, context in ((1, 512), (1, 8192), (32, 512), (256, 512)):
        for splits in {1: (8, 16, 32), 32: (1, 2), 256: (1,)}[batch]:
            for size, keys, stages in ((16, 64, 3), (16, 64, 4), (16, 32, 4), (64, 64, 3), (64, 64, 4), (64, 32, 4)):
                config = {"BM": 16, "BN": keys, "SPLITS": splits, "warps": 4, "stages": stages, "TMA": int(size == 64)}
                yield attend("decode", batch, batch, context, config, size)
    for rows in (512, 2048, 8192):
        for size, lines, keys, warps, stages in (
            (16, 128, 64, 8, 2), (16, 128, 64, 8, 3), (64, 128, 64, 8, 2), (64, 128, 64, 8, 3), (64, 128, 64, 4, 3),
            (64, 64, 64, 4, 3), (128, 128, 128, 8, 2), (128, 128, 128, 8, 3),
        ):  # fmt: skip
            config = {"BM": lines, "BN": keys, "SPLITS": 1, "warps": warps, "stages": stages, "TMA": int(size > 16)}
            yield attend("extend", rows, 1, rows, config, size)


def attend(function: str, rows: int, n: int, context: int, config: dict[str, int], size: int) -> Case:
    """One attention call: n sequences of ``context`` tokens, rows / n of them new."""
    heads, shared, d = 32, 8, 128
    width = 8192 // size
    blocks = max(n * context // size, 1)
    values = {
        "q": dense("q", "bfloat16", 1, heads, rows, d),
        "k_state": dense("k", "bfloat16", blocks, shared, size, d),
        "v_state": dense("v", "bfloat16", blocks, shared, size, d),
        "block_table": dense("table", "int32", n, width),
        "cu_seqlens": dense("cu", "int32", n + 1), "seq_lens": dense("lens", "int32", n),
        "sinks": None, "scale": d**-0.5, "window": 0, "softcap": 0.0, "sink_tokens": 0, "ring": False,
    }  # fmt: skip
    key = f"bfloat16 {function} {rows}x{n} h{heads}/{shared} d{d}"
    out = dense("out", "bfloat16", 1, rows, heads, d)
    call = site("llmopt.cached_attention", values, (out,), {"T": rows, "N": n}, function=function,
                tuning={"attention": {key: config}})  # fmt: skip
    found = attention.KERNEL.select(call)
    assert not isinstance(found, str), found
    each = context // size
    data = {
        "table": [min(i * each + j, blocks - 1) for i in range(n) for j in range(width)],
        "cu": [i * rows // n for i in range(n + 1)],
        "lens": [context] * n,
    }
    new = rows // n
    pairs = n * (new * context - new * (new - 1) // 2)
    moved = 2 * (2 * n * context * shared * d + 2 * rows * heads * d)
    return Case("llama-3.1-8b", f"{function} {n}x{context}", "attention", key, {**config, "size": size}, found, values,
                data, ("k", "v"), moved, 4 * pairs * heads * d, (out,))  # fmt: skip


def small() -> Iterator[Case]:
    """The kernels between the matrices, at decode batches and in prefill."""
    c, inner, heads, shared, d = 4096, 14336, 32, 8, 128
    for rows in (1, 32, 256, 2048):
        x, r = dense("x", "bfloat16", 1, rows, c), dense("r", "bfloat16", 1, rows, c)
        outs = (dense("out", "bfloat16", 1, rows, c), dense("total", "bfloat16", 1, rows, c))
        values: dict[str, Any] = {"x": x, "residual": r, "weight": dense("weight", "bfloat16", c), "eps": 1e-5,
                                  "offset": 0.0, "mul_in_fp32": False}  # fmt: skip
        yield plain("add_rms_norm", rows, norm.KERNEL, site("llmopt.add_rms_norm", values, outs, {"T": rows}))
        values = {"x": dense("x", "bfloat16", 1, rows, 2 * inner), "kind": "silu"}
        call = site("llmopt.gated_activation", values, (dense("out", "bfloat16", 1, rows, inner),), {"T": rows})
        yield plain("gated_activation", rows, gate.KERNEL, call)
        wide = (heads + 2 * shared) * d
        states = {n: dense(n, "bfloat16", 1024, shared, 16, d) for n in ("k_state", "v_state")}
        values = {
            "q": Strided("qkv", "bfloat16", (1, heads, rows, d), (0, d, wide, 1)),
            "k": Strided("qkv", "bfloat16", (1, shared, rows, d), (0, d, wide, 1), heads * d),
            "v": Strided("qkv", "bfloat16", (1, shared, rows, d), (0, d, wide, 1), (heads + shared) * d),
            "cos": dense("cos", "bfloat16", 1, rows, d // 2), "sin": dense("sin", "bfloat16", 1, rows, d // 2),
            **states, "slot_mapping": dense("slots", "int64", rows), "interleaved": False,
        }  # fmt: skip
        outputs = (dense("out", "bfloat16", 1, heads, rows, d), states["k_state"], states["v_state"])
        call = site("llmopt.rope_kv_write", values, outputs, {"T": rows})
        yield plain("rope_kv_write", rows, rotary.KERNELS[1], call, {"slots": list(range(rows))})
        values = {"weight": dense("weight", "bfloat16", 128256, c), "indices": dense("ids", "int64", 1, rows)}
        call = site("aten.embedding.default", values, (outs[0],), {"T": rows})
        yield plain("embedding", rows, embedding.KERNEL, call, {"ids": [i * 97 % 128256 for i in range(rows)]})


def plain(what: str, rows: int, kernel: Any, call: CallSite, data: dict[str, list[int]] | None = None) -> Case:
    """A case of a kernel with nothing to tune."""
    found = kernel.select(call)
    assert not isinstance(found, str), found
    moved = sum(launch.bytes for launch in found.launches)
    return Case("llama-3.1-8b", f"{what} {rows}", kernel.name, f"{rows} rows", {}, found, dict(call.values), data or {},
                (), moved, 0, call.outputs)  # fmt: skip


def cases() -> list[Case]:
    """Everything that is timed."""
    found: list[Case | None] = [*small(), *attentions()]
    found += linears("llama-3.1-8b", (1, 8, 32, 128, 256, 512, 2048))
    found += linears("llama-3.2-1b", (1, 256))
    found += linears("qwen3-0.6b", (1,))
    return [case for case in found if case is not None]
