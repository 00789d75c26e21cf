"""Cases of the kernel benchmark: calls of real models' shapes, in the configurations that ``llmopt tune`` times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmopt.program import OpCall
from targets.cuda.eight_bits import ALL_COLUMNS, CODES, INTERVAL, LINEAR_8, NORM_ROUNDED, ROUNDED
from targets.cuda.fusion import ABSENT, GATED_CODES, LINEAR, LINEAR_Q
from targets.cuda.kernel import CallSite, Strided
from targets.cuda.kernels import (
    attention,
    embedding,
    gate,
    gemm,
    gemm_cluster,
    gemm_persistent,
    gemm_q,
    gemm_q_few,
    gemm_ring,
    gemm_w8a8,
    gemm_w8a8_persistent,
    gemv,
    gemv_q,
    gemv_w8a8,
    moe,
    moe_q,
    norm,
    rotary,
    rounding,
)
from targets.cuda.tuning.build import Case, site_cases

MODELS = {
    "llama-3.1-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
                     "head": (128256, 4096)},
    "llama-3.2-1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192),
                     "head": (128256, 2048)},
    "qwen3-0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072),
                   "head": (151936, 1024)},
    "qwen3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288),
                 "head": (151936, 4096)},
    "mistral-7b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
                   "head": (32768, 4096)},
}  # fmt: skip
LINEARS = (gemv.KERNEL, gemm.KERNEL, gemm_cluster.KERNEL, gemm_persistent.KERNEL, gemm_ring.KERNEL)
OVER_CODES = (gemv_w8a8.KERNEL, gemm_w8a8.KERNEL, gemm_w8a8_persistent.KERNEL)
QUANTIZED_ROWS = (1, 8, 32, 64, 128, 256, 2048)
FULL = {"llama-3.1-8b": (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 8192)}
ROWS = (1, 8, 32, 128, 256, 2048)
PREFILL = (2048, 8192)
INTERVALS = (INTERVAL, 256, 512, ALL_COLUMNS)


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


def linears(model: str) -> Iterator[Case]:
    """Every linear of a model at the rows that count; gate and up with their activation, as the planner joins them, and
    those that add to the residual stream with and without it in prefill."""
    for what, (n, k) in MODELS[model].items():
        for m in FULL.get(model, ROWS):
            if what == "head" and m > 256:
                continue
            yield from linear(model, what, m, n, k)
            if what in ("o", "down") and m >= 2048:
                yield from linear(model, f"{what} + residual", m, n, k)


def linear(model: str, what: str, m: int, n: int, k: int) -> Iterator[Case]:
    """One linear by every kernel."""
    gated, added = what == "gate_up", "residual" in what
    out = dense("out", "bfloat16", 1, m, n // 2 if gated else n)
    values = {
        "input": dense("x", "bfloat16", 1, m, k), "weight": dense("weight", "bfloat16", n, k), "bias": None, **ABSENT,
        "gate": "silu" if gated else None, "residual": dense("rest", "bfloat16", 1, m, n) if added else None,
    }  # fmt: skip
    call = site(LINEAR if gated or added else "aten.linear.default", values, (out,), {"T": m})
    for kernel in LINEARS:
        yield from site_cases(kernel, call, model, what)


def quantized() -> Iterator[Case]:
    """The linears of the 8B shape over int4, int8 and FP8 weights, and over codes of both sides, at rows whose bfloat16
    times ``linears`` gives: what the crossover in a manifest compares."""
    model = "llama-3.1-8b"
    for what, (n, k) in MODELS[model].items():
        for m in QUANTIZED_ROWS if what != "head" else ():
            for bits, format, group in ((4, "int", 128), (8, "int", k), (8, "fp8_e4m3", k)):
                yield from weight_only(model, f"{what} w{bits}a16", m, n, k, (bits, format, group))
            for format, block in (("int8", 0), ("fp8_e4m3", 0), ("fp8_e4m3", 128)):
                yield from over_codes(model, f"{what} w8a8", m, n, k, format, block)


def sums_of_codes() -> Iterator[Case]:
    """Prefill of the 8B shape over FP8 codes by how many columns' products the tensor cores sum; those that add to the
    residual stream with it, as the planner joins them. With fast accumulation fewer rows too."""
    model = "llama-3.1-8b"
    for what, (n, k) in MODELS[model].items():
        for m in (128, 256, 512) if what != "head" else ():
            yield from over_codes(model, f"{what} w8a8", m, n, k, "fp8_e4m3", 0, ALL_COLUMNS)
        for m in PREFILL if what != "head" else ():
            for interval in INTERVALS:
                if interval != INTERVAL or m not in QUANTIZED_ROWS:
                    yield from over_codes(model, f"{what} w8a8", m, n, k, "fp8_e4m3", 0, interval)
                if what in ("o", "down"):
                    yield from over_codes(model, f"{what} + residual w8a8", m, n, k, "fp8_e4m3", 0, interval)


def weight_only(model: str, what: str, m: int, n: int, k: int, scheme: tuple[int, str, int]) -> Iterator[Case]:
    """One linear over packed weights; ``scheme``: bits, format, columns of a scale."""
    bits, format, group = scheme
    gated = what.startswith("gate_up") and m <= GATED_CODES
    values = {
        "x": dense("x", "bfloat16", 1, m, k), "codes": dense("codes", "uint8", n, k * bits // 8),
        "scales": dense("scales", "bfloat16", k // group, n), "zeros": None, "bias": None, "g_idx": None,
        "format": format, "bits": bits, "block_n": 1, "block_k": group, **ABSENT, "gate": "silu" if gated else None,
    }  # fmt: skip
    call = site(LINEAR_Q, values, (dense("out", "bfloat16", 1, m, n // 2 if gated else n),), {"T": m})
    for kernel in (gemm_q.KERNEL, gemm_q_few.KERNEL, gemm_ring.KERNEL, gemv_q.KERNEL):
        yield from site_cases(kernel, call, model, what)


def over_codes(
    model: str, what: str, m: int, n: int, k: int, format: str, block: int, interval: int = INTERVAL
) -> Iterator[Case]:
    """One linear over codes by every kernel; ``block``: rows and columns of a scale, 0: a scale a channel;
    ``interval``: columns of FP8 products that the tensor cores sum."""
    gated, kind = what.startswith("gate_up"), CODES[format]
    rest = dense("rest", "bfloat16", 1, m, n) if "residual" in what else None
    values = {
        "x": dense("x", kind, 1, m, k),
        "x_scale": dense("x_scale", "float32", 1, m), "input_scale": None, "round": format,
        "codes": dense("codes", kind, n, k),
        "scales": dense("scales", "bfloat16", k // (block or k), n // (block or 1)), "bias": None,
        "format": "int" if format == "int8" else format, "bits": 8, "block_n": block or 1, "block_k": block or k,
        "gate": "silu" if gated else None, "residual": rest, "interval": interval,
    }  # fmt: skip
    call = site(LINEAR_8, values, (dense("out", "bfloat16", 1, m, n // 2 if gated else n),), {"T": m})
    for kernel in OVER_CODES:
        yield from site_cases(kernel, call, model, what)


def attentions() -> Iterator[Case]:
    """Decode at several batches and contexts, and prefill, of the 8B shape; blocks of 16 tokens and of 64, and of 64
    tokens in FP8 and int8."""
    for size, kept in ((16, "bfloat16"), (64, "bfloat16"), (64, "float8_e4m3fn"), (64, "int8")):
        for batch, context in ((1, 512), (1, 8192), (32, 512), (128, 512), (256, 512)):
            yield from attend("decode", batch, batch, context, size, kept)
        for rows in (128, 512, 2048, 8192):
            yield from attend("extend", rows, 1, rows, size, kept)


def attend(function: str, rows: int, n: int, context: int, size: int, kept: str) -> Iterator[Case]:
    """One attention call: n sequences of ``context`` tokens, rows / n of them new; states of the type ``kept``."""
    heads, shared, d = 32, 8, 128
    scales = {} if kept == "bfloat16" else {f"{n}_scale": dense(f"{n}_scale", "float32", shared) for n in "kv"}
    values = {
        **scales,
        "q": dense("q", "bfloat16", 1, heads, rows, d), "k_state": dense("k", kept, 1, shared, size, d),
        "v_state": dense("v", kept, 1, shared, size, d), "block_table": dense("t", "int32", n, 8192 // size),
        "cu_seqlens": dense("cu", "int32", n + 1), "seq_lens": dense("lens", "int32", n),
        "sinks": None, "scale": d**-0.5, "window": 0, "softcap": 0.0, "sink_tokens": 0, "ring": False,
    }  # fmt: skip
    out = dense("out", "bfloat16", 1, rows, heads, d)
    call = site("llmopt.cached_attention", values, (out,), {"T": rows, "N": n}, function=function)
    what = f"{function} {n}x{context} of {size}" + (f" {kept}" if scales else "")
    yield from site_cases(attention.KERNEL, call, "llama-3.1-8b", what, context)


def mixtures() -> Iterator[Case]:
    """Experts of a Mixtral, a Qwen3-MoE and a gpt-oss at decode batches and in prefill, in bfloat16 and as codes."""
    for model, (experts, each, c, inner, format, group) in {
        "mixtral-8x7b": (8, 2, 4096, 14336, "int", 128),
        "qwen3-30b": (128, 8, 2048, 768, "int", 128),
        "gpt-oss-20b": (32, 4, 2880, 2880, "mxfp4", 32),
    }.items():
        for rows in (1, 32, 256, 2048):
            common = {
                "x": dense("x", "bfloat16", rows, c), "index": dense("index", "int64", rows, each),
                "weight": dense("share", "bfloat16", rows, each), "gate_up_bias": None, "down_bias": None,
                "activation": "silu" if format == "int" else "swiglu_oai",
            }  # fmt: skip
            out = (dense("out", "bfloat16", rows, c),)
            plain = {"gate_up": dense("g", "bfloat16", experts, 2 * inner, c)}
            plain |= {"down": dense("d", "bfloat16", experts, c, inner)}
            call = site("llmopt.moe_experts", {**common, **plain}, out, {"T": rows})
            yield from site_cases(moe.KERNEL, call, model, f"experts {rows}")
            packed: dict[str, Any] = {"format": format, "bits": 4, "block_n": 1}
            for stack, n, k in (("gate_up", 2 * inner, c), ("down", c, inner)):
                packed |= {
                    f"{stack}_codes": dense("c", "uint8", experts, n, k // 2), f"{stack}_zeros": None,
                    f"{stack}_scales": dense("s", "bfloat16", experts, k // group, n), f"{stack}_block_k": group,
                }  # fmt: skip
            call = site("llmopt.moe_experts_q", {**common, **packed}, out, {"T": rows})
            yield from site_cases(moe_q.KERNEL, call, model, f"experts {rows} {format}4 g{group}")


def small() -> Iterator[Case]:
    """The kernels between the matrices, at decode batches and in prefill."""
    c, inner, heads, shared, d = 4096, 14336, 32, 8, 128
    for rows in (1, 32, 256, 2048):
        x, r = dense("x", "bfloat16", 1, rows, c), dense("r", "bfloat16", 1, rows, c)
        outs = (dense("out", "bfloat16", 1, rows, c), dense("total", "bfloat16", 1, rows, c))
        values: dict[str, Any] = {"x": x, "residual": r, "weight": dense("weight", "bfloat16", c), "eps": 1e-5,
                                  "offset": 0.0, "mul_in_fp32": False}  # fmt: skip
        yield plain("add_rms_norm", rows, norm.KERNEL, site("llmopt.add_rms_norm", values, outs, {"T": rows}))
        coded = (dense("codes", CODES["fp8_e4m3"], 1, rows, c), outs[1], dense("scales", "float32", 1, rows))
        values |= {"op": "llmopt.add_rms_norm", "input_scale": None, "round": "fp8_e4m3"}
        yield plain("add_rms_norm to codes", rows, norm.KERNEL, site(NORM_ROUNDED, values, coded, {"T": rows}))
        for what, width in (("attention", heads * d), ("gate", inner)):
            values = {"x": dense("x", "bfloat16", 1, rows, width), "scale": None, "format": "fp8_e4m3", "gate": None}
            coded = (dense("codes", CODES["fp8_e4m3"], 1, rows, width), dense("scales", "float32", 1, rows))
            call = site(ROUNDED, values, coded, {"T": rows})
            yield plain(f"codes after {what}", rows, rounding.KERNEL, call)
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
        yield plain("rope_kv_write", rows, rotary.KERNELS[1], call, {"slots": tuple(range(rows))})
        values = {"weight": dense("weight", "bfloat16", 128256, c), "indices": dense("ids", "int64", 1, rows)}
        call = site("aten.embedding.default", values, (outs[0],), {"T": rows})
        ids = tuple(i * 97 % 128256 for i in range(rows))
        yield plain("embedding", rows, embedding.KERNELS[0], call, {"ids": ids})


def plain(what: str, rows: int, kernel: Any, call: CallSite, data: dict[str, tuple[int, ...]] | None = None) -> Case:
    """A case of a kernel with nothing to tune."""
    found = kernel.select(call)
    assert not isinstance(found, str), found
    moved = sum(launch.bytes for launch in found.launches)
    return Case("llama-3.1-8b", f"{what} {rows}", kernel.name, f"{rows} rows", {}, call, found, moved, 0, data or {})


def cases() -> list[Case]:
    """Everything that is timed."""
    plain = (case for model in MODELS for case in linears(model))
    return [*small(), *attentions(), *mixtures(), *plain, *quantized(), *sums_of_codes()]
