"""Linear layer of codes by codes for one row, which it normalizes and rounds itself: the weight is read once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from ..eight_bits import LINEAR_8, LONGEST_ROW
from ..kernel import CallSite, Selection
from ..pack import chunk_of
from ..tuning import find_linear, linear_form, quantized_form
from ._common import (
    ACTIVATIONS,
    LAUNCH_US,
    activation,
    cdiv,
    launch,
    modelled_us,
    nbytes,
    pdl_release,
    pdl_wait,
    pow2,
    rows_of,
)
from ._dequantize import fp8_bytes, signed_bytes
from ._eight_bits import scheme
from ._rounding import row_scale, to_codes


@triton.jit
def gemv_w8a8(
    x, codes, scales, static, bias, norm, residual, out,
    N: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    eps: tl.constexpr, offset: tl.constexpr, MUL_FP32: tl.constexpr, KIND: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (N,) = gate(weight · round(norm(x)) + bias) + residual: the row's codes times ``codes`` (N, K), (2N, K) with
    KIND, of FP8 or int8, scaled; scales (K / GROUP, N / SHARED).

    x (K,) is rounded as ``llmopt.round_activations`` does, by ``static`` (1,) or its own scale, after the RMSNorm of
    ``norm`` (K,) where there is one. A program makes the codes once, holds them in registers, and walks STEPS tiles of
    ROWS outputs; the first tile is loaded before the wait for x, each other one before the one before is
    multiplied. Products are of fp32, exact; sums of CHUNK columns meet the scales of groups.
    Floor: the codes' N · K bytes.
    """
    k = tl.arange(0, BLOCK)
    lane = tl.arange(0, ROWS)
    first = tl.program_id(0) * (ROWS * STEPS)
    w = tile_of(codes, first + lane, k, N, K, BLOCK, ROWS * STEPS)
    if KIND is not None:
        u = tile_of(codes + N * K, first + lane, k, N, K, BLOCK, ROWS * STEPS)
    if norm is not None:
        s = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32) + offset
    pdl_release(PDL)
    pdl_wait(PDL)
    v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if norm is not None:
        v = v * tl.rsqrt(tl.sum(v * v, 1)[:, None] / K + eps)
        if not MUL_FP32:  # as ``norm`` rounds
            v = v.to(x.dtype.element_ty).to(tl.float32)
            s = s.to(x.dtype.element_ty).to(tl.float32)
        v = (v * s[None, :]).to(x.dtype.element_ty).to(tl.float32)
    used = row_scale(v, static, FP8)
    a = to_codes(v, used, FP8)
    used = tl.sum(used, 0)
    for step in range(STEPS):
        n = first + step * ROWS + lane
        now = w
        if step + 1 < STEPS:
            w = tile_of(codes, n + ROWS, k, N, K, BLOCK, ROWS * STEPS)
        total = row_sums(now, a, scales, n, N, 0, K, SHARED, GROUP, CHUNK, FP8, KIND is not None) * used
        ok = n < N
        if bias is not None:
            total += tl.load(bias + n, mask=ok, other=0.0).to(tl.float32)
        if KIND is not None:
            then = u
            if step + 1 < STEPS:
                u = tile_of(codes + N * K, n + ROWS, k, N, K, BLOCK, ROWS * STEPS)
            more = row_sums(then, a, scales, n, N, N, K, SHARED, GROUP, CHUNK, FP8, True) * used
            if bias is not None:
                more += tl.load(bias + N + n, mask=ok, other=0.0).to(tl.float32)
            total = activation(total, KIND) * more
        if residual is not None:
            rest = tl.load(residual + n, mask=ok, other=0.0).to(tl.float32)
            total = total.to(out.dtype.element_ty).to(tl.float32) + rest
        tl.store(out + n, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def tile_of(codes, n, k, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Codes (ROWS, BLOCK) of the outputs n, as bytes; 0 where there are none."""
    at = codes + n[:, None].to(tl.int64) * K + k[None, :]
    if N % SPAN == 0 and BLOCK == K:
        found = tl.load(at, eviction_policy="evict_first")
    else:
        found = tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0, eviction_policy="evict_first")
    return found


@triton.jit
def row_sums(
    w, a, scales, n, N: tl.constexpr, UPS: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, FP8: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Scaled sums (ROWS,) of a tile's codes times a (1, BLOCK); the weight's rows are n + UPS."""
    TABLE: tl.constexpr = (2 * N if GATED else N) // SHARED
    row = (tl.where(n < N, n, 0) + UPS) // SHARED
    numbers = fp8_bytes(w, 0, tl.bfloat16) if FP8 else signed_bytes(w, 0, tl.bfloat16)
    products = numbers.to(tl.float32) * a
    if GROUP == K:
        sums = tl.sum(products, 1) * tl.load(scales + row).to(tl.float32)
    else:
        PIECES: tl.constexpr = w.shape[1] // CHUNK
        piece = tl.arange(0, PIECES)[None, :] * CHUNK
        s = tl.load(scales + tl.minimum(piece, K - 1) // GROUP * TABLE + row[:, None]).to(tl.float32)
        sums = tl.sum(tl.sum(tl.reshape(products, (w.shape[0], PIECES, CHUNK)), 2) * s, 1)
    return sums


def tile(n: int, k: int, gated: bool) -> dict[str, int]:
    """Outputs of a tile, tiles of a program and warps for a shape nobody measured: 32 bytes of codes a thread in
    flight, and several tiles, so that the row is rounded once for as many outputs."""
    block = max(pow2(k), 32)
    warps = max(1, min(16, block // 512))
    rows = 1024 * warps // block // (2 if gated else 1)
    return {"rows": max(1, rows), "steps": 8 if n >= 4096 else 4, "warps": warps}


@dataclass(frozen=True)
class GemvW8A8:
    """``cuda.linear_8`` of one row of numbers, which its programs round to codes."""

    name: str = "gemv_w8a8"
    ops: tuple[str, ...] = (LINEAR_8,)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        x, codes, gate, (out,) = v["x"], v["codes"], v["gate"], site.outputs
        layout, k, n, group = rows_of(x), codes.shape[1], out.shape[-1], v["block_k"]
        if v["x_scale"] is not None:
            return "it rounds its input itself"
        if layout is None or layout[0] != 1:
            return "more than one row"
        if k > LONGEST_ROW:
            return f"a row of {k} does not fit registers"
        if gate is not None and gate not in ACTIVATIONS:
            return f"activation {gate}"
        key = quantized_form(v, k)
        tuned = find_linear(site.tuning, self.name, key, 1, codes.shape[0], k, linear_form(v))
        c = tuned.config if tuned else tile(n, k, gate is not None)
        block = max(pow2(k), 32)
        constants = {
            "N": n, "K": k, "SHARED": v["block_n"], "GROUP": group, "CHUNK": min(chunk_of(8, group, k), block),
            "eps": float(v["eps"]), "offset": float(v["offset"]), "MUL_FP32": bool(v["mul_in_fp32"]), "KIND": gate,
            "FP8": v["format"] == "fp8_e4m3", "ROWS": c["rows"], "STEPS": c["steps"], "BLOCK": block,
        }  # fmt: skip
        tensors = {
            "x": x, "codes": replace(codes, dtype="uint8"), "scales": v["scales"], "static": v["input_scale"],
            "bias": v["bias"], "norm": v["norm"], "residual": v["residual"], "out": out,
        }  # fmt: skip
        moved = nbytes(codes, v["scales"], x, out)
        grid = (cdiv(n, c["rows"] * c["steps"]),)
        made = launch(site.arch, gemv_w8a8, grid, tensors, constants, warps=c["warps"], moved=moved)
        why = f"{scheme(v, k)}, one row: {c['rows']} outputs a tile, {c['steps']} tiles a program"
        why += f", {tuned.note}" if tuned else ", modelled"
        cost = modelled_us(moved, site.arch, efficiency=0.95) - LAUNCH_US / 2
        return Selection((made,), why, tuned.us if tuned else cost)


KERNEL = GemvW8A8()
