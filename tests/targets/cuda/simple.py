"""The plainest kernels that serve a Llama: one program a row, no tuning. They test plans, not speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from targets.cuda.kernel import CallSite, KernelLaunch, Scratch, Selection, Specialization, Strided
from targets.cuda.kernels import greedy, sample


@triton.jit
def embedding(ids, table, out, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    token = tl.load(ids + row)
    tl.store(out + row * C + c, tl.load(table + token * C + c, mask=c < C), mask=c < C)


@triton.jit
def rotary_table(positions, inv_freq, cos, sin, scale: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    f = tl.arange(0, BLOCK)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + f, mask=f < F, other=0.0)
    tl.store(cos + row * F + f, (tl.cos(angle) * scale).to(cos.dtype.element_ty), mask=f < F)
    tl.store(sin + row * F + f, (tl.sin(angle) * scale).to(sin.dtype.element_ty), mask=f < F)


@triton.jit
def norm(x, residual, weight, out, total, eps: tl.constexpr, ADD: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    if ADD:
        rounded = (v + tl.load(residual + row * C + c, mask=c < C, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
        tl.store(total + row * C + c, rounded, mask=c < C)
        v = rounded.to(tl.float32)
    normed = (v * tl.rsqrt(tl.sum(v * v) / C + eps)).to(out.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, scaled.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def linear(
    x, weight, bias, out,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(weight + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(a, b, acc)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def counted_copy(source, out, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """Copies, and proves on the way that its counter came as zero: else the output is NaN. Leaves zero."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dirty = tl.atomic_add(counter + tl.program_id(0), 1)
    value = tl.load(source + n, mask=n < N).to(tl.float32)
    tl.store(out + n, tl.where(dirty == 0, value, float("nan")).to(out.dtype.element_ty), mask=n < N)
    tl.atomic_add(counter + tl.program_id(0), -1)


@triton.jit
def silu_gate(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    act = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + i, (act * up).to(out.dtype.element_ty), mask=i < WIDTH)


@triton.jit
def rope_kv_write(
    q, k, v, cos, sin, k_state, v_state, slots, q_out,
    SQ: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.arange(0, F)
    c = tl.load(cos + row * F + f).to(tl.float32)
    s = tl.load(sin + row * F + f).to(tl.float32)
    slot = tl.load(slots + row)
    if head < HQ:
        a = tl.load(q + row * SQ + head * D + f).to(tl.float32)
        b = tl.load(q + row * SQ + head * D + F + f).to(tl.float32)
        target = q_out + (head * T + row) * D
        tl.store(target + f, (a * c - b * s).to(q_out.dtype.element_ty))
        tl.store(target + F + f, (b * c + a * s).to(q_out.dtype.element_ty))
    elif slot >= 0:
        at = ((slot // S * HK) * S + slot % S) * D
        if head < HQ + HK:
            h = head - HQ
            a = tl.load(k + row * SK + h * D + f).to(tl.float32)
            b = tl.load(k + row * SK + h * D + F + f).to(tl.float32)
            tl.store(k_state + at + h * S * D + f, (a * c - b * s).to(k_state.dtype.element_ty))
            tl.store(k_state + at + h * S * D + F + f, (b * c + a * s).to(k_state.dtype.element_ty))
        else:
            h = head - HQ - HK
            d = tl.arange(0, D)
            tl.store(v_state + at + h * S * D + d, tl.load(v + row * SV + h * D + d))


@triton.jit
def attention(
    q, k_state, v_state, table, cu, lens, out,
    N: tl.constexpr, W: tl.constexpr, T: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seq = -1
    for i in range(N):
        if (row >= tl.load(cu + i)) & (row < tl.load(cu + i + 1)):
            seq = i
    d, s = tl.arange(0, D), tl.arange(0, S)
    if seq >= 0:
        position = tl.load(lens + seq) - (tl.load(cu + seq + 1) - row)
        query = tl.load(q + (head * T + row) * D + d).to(tl.float32)
        top, mass, acc = -1.0e30, 0.0, tl.zeros((D,), tl.float32)
        for b in range(position // S + 1):
            base = (tl.load(table + seq * W + b).to(tl.int64) * HK + head // (H // HK)) * S * D
            keys = tl.load(k_state + base + s[:, None] * D + d[None, :]).to(tl.float32)
            seen = b * S + s <= position
            score = tl.where(seen, tl.sum(keys * query[None, :], 1) * scale, -1.0e30)
            peak = tl.maximum(top, tl.max(score))
            p = tl.where(seen, tl.exp(score - peak), 0.0)
            values = tl.load(v_state + base + s[:, None] * D + d[None, :], mask=seen[:, None], other=0.0)
            acc = acc * tl.exp(top - peak) + tl.sum(p[:, None] * values.to(tl.float32), 0)
            mass = mass * tl.exp(top - peak) + tl.sum(p)
            top = peak
        tl.store(out + (row * H + head) * D + d, (acc / mass).to(out.dtype.element_ty))


@triton.jit
def take_rows(x, index, out, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    tl.store(out + row * C + c, tl.load(x + tl.load(index + row) * C + c, mask=c < C), mask=c < C)


POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32", "int64": "*i64"}


def one(function: Any, grid: tuple[int, ...], tensors: dict[str, Any], num_warps: int = 4, **constants: Any) -> Any:
    """A launch of one of this file's kernels."""
    signature = tuple((name, "*i32" if isinstance(x, Scratch) else POINTERS[x.dtype]) for name, x in tensors.items())
    spec = Specialization(__name__, function.__name__, signature, tuple(constants.items()), num_warps)
    return KernelLaunch(spec, (*grid, 1, 1)[:3], tuple(tensors.values()))


def pow2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def serve_embedding(site: CallSite, v: Any) -> Any:
    (out,) = site.outputs
    rows, c = site.dims["T"], out.shape[-1]
    return one(embedding, (rows,), {"ids": v["indices"], "table": v["weight"], "out": out}, C=c, BLOCK=pow2(c))


def serve_rotary(site: CallSite, v: Any) -> Any:
    if v["inv_freq_long"] is not None:
        return "longrope"
    cos, sin = site.outputs
    tensors = {"positions": v["positions"], "inv_freq": v["inv_freq"], "cos": cos, "sin": sin}
    f = cos.shape[-1]
    return one(rotary_table, (cos.shape[1],), tensors, scale=v["scale"], F=f, BLOCK=pow2(f))


def serve_norm(site: CallSite, v: Any) -> Any:
    if v["offset"] or v["mul_in_fp32"] or v["weight"] is None:
        return "only Llama's form"
    residual = v.get("residual", v["x"])
    tensors = {
        "x": v["x"],
        "residual": residual,
        "weight": v["weight"],
        "out": site.outputs[0],
        "total": site.outputs[-1],
    }
    c = v["x"].shape[-1]
    add = "residual" in v
    return one(norm, (v["x"].shape[-2],), tensors, eps=v["eps"], ADD=add, C=c, BLOCK=pow2(c))


def serve_linear(site: CallSite, v: Any) -> Any:
    x, weight, (out,) = v["input"], v["weight"], site.outputs
    n, k = weight.shape
    m = out.shape[-2]
    tensors = {"x": x, "weight": weight, "bias": v["bias"] or weight, "out": out}
    tiles = {"BM": 16, "BN": 64, "BK": 64} if m <= 64 else {"BM": 128, "BN": 128, "BK": 64}
    grid = (-(-n // tiles["BN"]), -(-m // tiles["BM"]))
    return one(linear, grid, tensors, 4 if m <= 64 else 8, M=m, N=n, K=k, HAS_BIAS=v["bias"] is not None, **tiles)


def serve_gate(site: CallSite, v: Any) -> Any:
    if v["kind"] != "silu":
        return f"activation {v['kind']}"
    (out,) = site.outputs
    i = out.shape[-1]
    return one(silu_gate, (out.shape[1], -(-i // 1024)), {"x": v["x"], "out": out}, WIDTH=i, BLOCK=1024)


def serve_rope(site: CallSite, v: Any) -> Any:
    q, k, x, q_out = v["q"], v["k"], v["v"], site.outputs[0]
    _, heads, rows, dim = q.shape
    half = v["cos"].shape[-1]
    if v["interleaved"] or 2 * half != dim:
        return "half-split full rotation only"
    tensors = {name: v[name] for name in ("q", "k", "v", "cos", "sin", "k_state", "v_state")}
    tensors |= {"slots": v["slot_mapping"], "q_out": q_out}
    strides = {"SQ": q.strides[2], "SK": k.strides[2], "SV": x.strides[2]}
    groups, size = k.shape[1], v["k_state"].shape[2]
    sizes = {"HQ": heads, "HK": groups, "T": rows, "D": dim, "F": half, "S": size}
    return one(rope_kv_write, (rows, heads + 2 * groups), tensors, 1, **strides, **sizes)


def serve_attention(site: CallSite, v: Any) -> Any:
    if v["window"] or v["softcap"] or v["ring"] or v["sinks"] is not None:
        return "plain causal attention only"
    q, k = v["q"], v["k_state"]
    _, heads, rows, dim = q.shape
    tensors = {"q": q, "k_state": k, "v_state": v["v_state"], "table": v["block_table"], "cu": v["cu_seqlens"]}
    tensors |= {"lens": v["seq_lens"], "out": site.outputs[0]}
    sizes = {"N": v["seq_lens"].shape[0], "W": v["block_table"].shape[1], "T": rows, "H": heads, "HK": k.shape[1]}
    return one(attention, (rows, heads), tensors, D=dim, S=k.shape[2], scale=v["scale"], **sizes)


def serve_take(site: CallSite, v: Any) -> Any:
    """Two launches: the rows go to scratch and are copied from there, past a counter."""
    if v["dim"] != 1:
        return f"dimension {v['dim']}"
    (out,) = site.outputs
    c, total = out.shape[-1], out.shape[1] * out.shape[-1]
    programs = -(-total // 1024)
    middle = Scratch("rows", total * 2)
    moved = Specialization(
        __name__, "take_rows", (("x", POINTERS[out.dtype]), ("index", "*i64"), ("out", POINTERS[out.dtype])),
        (("C", c), ("BLOCK", pow2(c))),
    )  # fmt: skip
    kind = POINTERS[out.dtype]
    copied = Specialization(
        __name__,
        "counted_copy",
        (("source", kind), ("out", kind), ("counter", "*i32")),
        (("N", total), ("BLOCK", 1024)),
    )
    return (
        KernelLaunch(moved, (out.shape[1], 1, 1), (v["self"], v["index"], middle)),
        KernelLaunch(copied, (programs, 1, 1), (middle, out, Scratch("counter", 4 * programs, zeroed=True))),
    )


@dataclass(frozen=True)
class Simple:
    """A kernel of this file."""

    name: str
    ops: tuple[str, ...]
    serve: Callable[[CallSite, Any], Any]

    def select(self, site: CallSite) -> Selection | str:
        for name, value in site.values.items():
            views = name in ("q", "k", "v")
            if isinstance(value, Strided) and not value.contiguous and not views:
                return f"{name} is strided"
        found = self.serve(site, site.values)
        if isinstance(found, str):
            return found
        return Selection(found if isinstance(found, tuple) else (found,), "the only one", 1.0)


KERNELS = (
    *greedy.KERNELS,
    sample.KERNEL,
    Simple("embedding", ("aten.embedding.default",), serve_embedding),
    Simple("rotary_table", ("llmopt.rotary_table",), serve_rotary),
    Simple("norm", ("llmopt.rms_norm", "llmopt.add_rms_norm"), serve_norm),
    Simple("linear", ("aten.linear.default",), serve_linear),
    Simple("gate", ("llmopt.gated_activation",), serve_gate),
    Simple("rope", ("llmopt.rope_kv_write",), serve_rope),
    Simple("attention", ("llmopt.cached_attention",), serve_attention),
    Simple("take", ("aten.index_select.default",), serve_take),
)
