"""Linear layer of up to 16 rows over weights of 4 and 8 bits: codes go from memory to the tensor cores in registers.

Written in Gluon, which says what each thread holds. In ``gemm_q``, which is Triton, weights on their way to the tensor
cores pass through shared memory, and each group's product is waited for: on an H200 the linears of an 8B layer over
int4 take it some 97 us at 8 rows (by the step) and this kernel 49, where the codes' bytes take 26 (ADR 35).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..eight_bits import QUANTIZED
from ..fusion import ABSENT, LINEAR_Q
from ..kernel import CallSite, Scratch, Selection
from ..pack import chunk_of, parts_of
from ..tuning import find_linear, linear_form, quantized_form
from ._common import cdiv, launch, modelled_us, nbytes, pow2
from ._eight_bits import scheme
from ._few_twin import gemm_q_few_twin, weight_row
from ._fragments import FORMS, input_layout, multiply, numbers, weight_layout, zero_addend
from ._gluon import barrier
from .gemm import finish as store_tile
from .gemm_q import as_elements, read_rows

MOST_ROWS = 16
"""Rows of x at most: 32 take longer than in ``gemm_q`` (measured on an H200)."""
FIRST_US, SUMS = 3.0, 80e6
"""What an H200 takes over 8 to 32 rows, seen of four shapes: some microseconds, then products of code and x a
microsecond."""


@gluon.jit
def gemm_q_few(
    x, codes, scales, zeros, bias, residual, out, partial, counter, M,
    N: gl.constexpr, K: gl.constexpr, X_ROW: gl.constexpr, GATE: gl.constexpr, FORM: gl.constexpr, CHUNK: gl.constexpr,
    PARTS: gl.constexpr, SHARED: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    K_WARPS: gl.constexpr, ROW_WARPS: gl.constexpr, DEPTH: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, fp32 sums; weight = (code - zero) · scale, a scale for SHARED rows
    of GROUP columns; M at most BM.

    Operands, gate and residual as ``gemm_q`` has them, codes as words of 4 bytes in chunks of CHUNK columns, whose
    halfwords hold PARTS codes each. A program owns BN rows of the weight (with GATE half gates, half ups): of its
    K_WARPS · ROW_WARPS warps, K_WARPS divide the chunks and add their sums at the end, and ROW_WARPS divide the rows
    and read the same x. Codes and scales are loaded DEPTH chunks a warp ahead, the first before the wait for x. Grid
    (N tiles, SPLIT); with SPLIT > 1 the last part to come adds all parts in order. Floor: the codes' bytes.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [K_WARPS, ROW_WARPS, 1], [1, 16, 8])
    HALVES: gl.constexpr = CHUNK // PARTS
    RUN: gl.constexpr = min(8, HALVES // 4)
    CODES: gl.constexpr = weight_layout(K_WARPS, ROW_WARPS, BN, HALVES // 2, RUN // 2)
    INPUT: gl.constexpr = input_layout(K_WARPS, ROW_WARPS, BM, HALVES, RUN)
    STEP: gl.constexpr = K_WARPS * DEPTH
    SPAN: gl.constexpr = STEP * SPLIT
    TYPE: gl.constexpr = x.dtype.element_ty
    SHARE: gl.constexpr = (K // CHUNK + SPAN - 1) // SPAN * STEP
    TABLE: gl.constexpr = N // SHARED
    EARLY: gl.constexpr = BM <= 8  # measured: before the next codes up to 8 rows, after them from 16 on
    tile = gl.program_id(0)
    begin = gl.program_id(1) * SHARE
    end = begin + SHARE
    row = weight_row(tile, gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, CODES))), N, BN, GATE)
    word = gl.arange(0, HALVES // 2, gl.SliceLayout(0, gl.SliceLayout(1, CODES)))
    codes_at = codes + row.to(gl.int64)[None, :, None] * (K // PARTS // 2) + word[None, None, :]
    scales_at = scales
    if GROUP != K:
        line = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))
        scales_at = scales + (weight_row(tile, line, N, BN, GATE) // SHARED)[None, :]
    zeros_at = zeros
    if zeros is not None:
        zeros_at = zeros + row[None, :]
    m = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, INPUT)))
    column = gl.arange(0, HALVES, gl.SliceLayout(0, gl.SliceLayout(1, INPUT)))
    x_at = x + gl.where(m < M, m, 0)[None, :, None] * X_ROW + column[None, None, :]
    first = load_chunks(codes_at, scales_at, zeros_at, begin, K, CHUNK, GROUP, TABLE, K_WARPS, SPAN, TYPE)
    second = first
    if DEPTH == 2:
        second = load_chunks(
            codes_at, scales_at, zeros_at, begin + K_WARPS, K, CHUNK, GROUP, TABLE, K_WARPS, SPAN, TYPE
        )
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = gl.zeros((K_WARPS, BN, BM), gl.float32, MMA)
    for start in range(begin, end, STEP):
        here, after = first, second
        if EARLY:
            near, far = load_steps(x_at, start, K, CHUNK, PARTS, K_WARPS, SPAN, DEPTH)
        if start + STEP < end:
            first = load_chunks(
                codes_at, scales_at, zeros_at, start + STEP, K, CHUNK, GROUP, TABLE, K_WARPS, SPAN, TYPE
            )
            if DEPTH == 2:
                second = load_chunks(
                    codes_at, scales_at, zeros_at, start + STEP + K_WARPS, K, CHUNK, GROUP, TABLE, K_WARPS, SPAN, TYPE
                )
        if not EARLY:
            near, far = load_steps(x_at, start, K, CHUNK, PARTS, K_WARPS, SPAN, DEPTH)
        acc = add_chunks(acc, here, near, K, GROUP, FORM, RUN)
        if DEPTH == 2:
            acc = add_chunks(acc, after, far, K, GROUP, FORM, RUN)
    total = gl.sum(acc, 0)
    if SPLIT == 1:
        finish(total, scales, bias, residual, out, tile, M, N, K, BN, BM, SHARED, GROUP, GATE)
    else:
        LAYOUT: gl.constexpr = total.type.layout
        spot = gl.arange(0, BN, gl.SliceLayout(1, LAYOUT))[:, None] * BM
        spot += gl.arange(0, BM, gl.SliceLayout(0, LAYOUT))[None, :]
        parts = partial + (tile * SPLIT).to(gl.int64) * (BN * BM) + spot
        gl.store(parts + gl.program_id(1) * (BN * BM), total)
        barrier()
        if gl.atomic_add(counter + tile, 1, sem="acq_rel") == SPLIT - 1:
            barrier()
            total = gl.zeros((BN, BM), gl.float32, LAYOUT)
            for i in gl.static_range(SPLIT):
                total += gl.load(parts + i * (BN * BM), cache_modifier=".cg")
            finish(total, scales, bias, residual, out, tile, M, N, K, BN, BM, SHARED, GROUP, GATE)
            gl.store(counter + tile, 0)


@gluon.jit
def load_chunks(
    codes_at, scales_at, zeros_at, start, K: gl.constexpr, CHUNK: gl.constexpr, GROUP: gl.constexpr,
    TABLE: gl.constexpr, K_WARPS: gl.constexpr, SPAN: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Of the K_WARPS chunks from ``start``: words of codes (K_WARPS, rows, words), scales (K_WARPS, rows), what
    ``zero_addend`` gives. Nothing for chunks past K, which there are none of where SPAN divides K."""
    EVEN: gl.constexpr = K // CHUNK % SPAN == 0
    part = gl.arange(0, K_WARPS, gl.SliceLayout(1, gl.SliceLayout(2, codes_at.type.layout)))
    chunk = start + part
    at = codes_at + (chunk * codes_at.shape[2])[:, None, None]
    if EVEN:
        words = gl.load(at, eviction_policy="evict_first")
    else:
        words = gl.load(at, mask=(chunk < K // CHUNK)[:, None, None], other=0, eviction_policy="evict_first")
    scale = start
    if GROUP != K:
        scale = entries(scales_at, start, K, CHUNK, GROUP, TABLE, K_WARPS, EVEN).to(gl.float32)
    addend = words
    if zeros_at is not None:
        addend = zero_addend(entries(zeros_at, start, K, CHUNK, GROUP, TABLE, K_WARPS, EVEN), DTYPE)
        words, addend = gl.broadcast(words, addend)
    return words, scale, addend


@gluon.jit
def entries(
    at, start, K: gl.constexpr, CHUNK: gl.constexpr, GROUP: gl.constexpr, TABLE: gl.constexpr,
    K_WARPS: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Entries (K_WARPS, rows) of a table of groups, for the K_WARPS chunks from ``start``."""
    chunk = start + gl.arange(0, K_WARPS, gl.SliceLayout(1, at.type.layout))
    where = at + (chunk * CHUNK // GROUP * TABLE)[:, None]
    return gl.load(where) if EVEN else gl.load(where, mask=(chunk < K // CHUNK)[:, None], other=0)


@gluon.jit
def load_steps(
    x_at, start, K: gl.constexpr, CHUNK: gl.constexpr, PARTS: gl.constexpr, K_WARPS: gl.constexpr, SPAN: gl.constexpr,
    DEPTH: gl.constexpr,
):  # fmt: skip
    """What meets the chunks of a step, and those of its second half."""
    near = load_inputs(x_at, start, K, CHUNK, PARTS, K_WARPS, SPAN)
    far = near
    if DEPTH == 2:
        far = load_inputs(x_at, start + K_WARPS, K, CHUNK, PARTS, K_WARPS, SPAN)
    return near, far


@gluon.jit
def load_inputs(
    x_at, start, K: gl.constexpr, CHUNK: gl.constexpr, PARTS: gl.constexpr, K_WARPS: gl.constexpr, SPAN: gl.constexpr
):
    """Columns of x (K_WARPS, M, columns) that meet each part of the chunks from ``start``; zeros past K."""
    EVEN: gl.constexpr = K // CHUNK % SPAN == 0
    HALVES: gl.constexpr = CHUNK // PARTS
    chunk = start + gl.arange(0, K_WARPS, gl.SliceLayout(1, gl.SliceLayout(2, x_at.type.layout)))
    at = x_at + (chunk * CHUNK)[:, None, None]
    ok = (chunk < K // CHUNK)[:, None, None]
    if PARTS == 2:
        return load_input(at, ok, EVEN), load_input(at + HALVES, ok, EVEN)
    else:
        return (
            load_input(at, ok, EVEN), load_input(at + HALVES, ok, EVEN), load_input(at + 2 * HALVES, ok, EVEN),
            load_input(at + 3 * HALVES, ok, EVEN),
        )  # fmt: skip


@gluon.jit
def load_input(at, ok, EVEN: gl.constexpr):
    """Elements at pointers, all of which are good where EVEN."""
    return gl.load(at) if EVEN else gl.load(at, mask=ok, other=0.0)


@gluon.jit
def add_chunks(acc, loaded, inputs, K: gl.constexpr, GROUP: gl.constexpr, FORM: gl.constexpr, RUN: gl.constexpr):
    """acc (parts, rows, M) and each part's product of its chunk, scaled."""
    words, scale, addend = loaded
    found = acc if GROUP == K else gl.zeros_like(acc)
    for i in gl.static_range(len(inputs)):
        found = multiply(numbers(words, addend, FORM, i, inputs[i].dtype), inputs[i], found, RUN)
    return found if GROUP == K else acc + found * scale[:, :, None]


@gluon.jit
def finish(
    total, scales, bias, residual, out, tile, M, N: gl.constexpr, K: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr,
    SHARED: gl.constexpr, GROUP: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """The epilogue of a tile's sums (BN, BM), as ``gemm`` has it; scales of whole rows meet the sums here."""
    if GROUP == K:
        line = gl.arange(0, BN, gl.SliceLayout(1, total.type.layout))
        total = total * gl.load(scales + weight_row(tile, line, N, BN, GATE) // SHARED).to(gl.float32)[:, None]
    if GATE is None:
        turned = gl.permute(total, (1, 0))
        store_rows(turned, turned, bias, residual, out, tile * BN, M, N, GATE)
    else:
        HALF: gl.constexpr = BN // 2
        BOTH: gl.constexpr = gl.BlockedLayout([2, 1, 1], [1, 8, 4], [1, 1, gl.num_warps()], [0, 1, 2])
        both = gl.convert_layout(gl.reshape(total, (2, HALF, BM)), BOTH)
        gates, ups = gl.split(gl.permute(both, (2, 1, 0)))
        store_rows(gates, ups, bias, residual, out, tile * HALF, M, N // 2, GATE)


@gluon.jit
def store_rows(total, up, bias, residual, out, n0, M, COLUMNS: gl.constexpr, GATE: gl.constexpr):
    """Columns of the result from n0 on, of all rows."""
    m = gl.arange(0, total.shape[0], gl.SliceLayout(1, total.type.layout))
    n = n0 + gl.arange(0, total.shape[1], gl.SliceLayout(0, total.type.layout))
    store_tile(total, up, bias, residual, out, m, n, M, COLUMNS, GATE)


def form_of(values: Mapping[str, Any]) -> str:
    """How the codes become numbers: a key of ``_fragments.FORMS``."""
    kind = values["format"] if values["format"] != "int" else f"int{values['bits']}"
    return kind + (" zeros" if values["zeros"] is not None else "")


def shape_tiles(gated: bool) -> dict[str, int]:
    """Tile sizes and warps of a program nobody measured."""
    return {"BN": 32 if gated else 16, "K_WARPS": 4 if gated else 8, "ROW_WARPS": 1, "DEPTH": 1, "SPLIT": 1}


@dataclass(frozen=True)
class GemmQFew:
    """``llmopt.linear_q`` and ``cuda.linear_q`` of up to 16 rows."""

    name: str = "gemm_q_few"
    ops: tuple[str, ...] = (QUANTIZED, LINEAR_Q)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = {**ABSENT, **site.values}
        codes, gate, bits = v["codes"], v["gate"], v["bits"]
        rows = read_rows(v, site.outputs[0])
        if isinstance(rows, str):
            return rows
        x, out, residual = rows
        (m, k), n, group = x.shape, codes.shape[0], v["block_k"]
        chunk, form = chunk_of(bits, group, k), form_of(v)
        if form not in FORMS["bf16"] or chunk < 64 or k % chunk or codes.dtype != "uint8":
            return f"{form} codes in chunks of {chunk} columns"
        if m > MOST_ROWS:
            return f"more than {MOST_ROWS} rows"
        if x.strides[0] % 8 or x.offset % 8:
            return "the rows are not aligned"
        if gate is not None and n % 2:
            return "gates and ups differ in number"
        tuned = find_linear(site.tuning, self.name, quantized_form(v, k), m, n, k, linear_form(v))
        c = dict(tuned.config) if tuned else shape_tiles(gate is not None)
        bm, bn, split = max(8, pow2(m)), max(c["BN"], 32 if gate else 16), c["SPLIT"]
        tiles = cdiv(out.shape[1], bn if gate is None else bn // 2)
        tensors = {
            "x": x, "codes": as_elements(codes, "int32"), "scales": v["scales"], "zeros": v["zeros"], "bias": v["bias"],
            "residual": residual, "out": out, "M": m,
            "partial": Scratch("partial", 4 * tiles * split * bm * bn) if split > 1 else None,
            "counter": Scratch("counter", 4 * tiles, zeroed=True) if split > 1 else None,
        }  # fmt: skip
        constants = {
            "N": n, "K": k, "X_ROW": x.strides[0], "GATE": gate, "FORM": form, "CHUNK": chunk,
            "PARTS": parts_of(bits, chunk, k), "SHARED": v["block_n"], "GROUP": group, "BM": bm, "BN": bn,
            **{name: c[name] for name in ("K_WARPS", "ROW_WARPS", "DEPTH", "SPLIT")},
        }  # fmt: skip
        moved = nbytes(x, codes, v["scales"], v["zeros"], residual, out)
        made = launch(
            site.arch, gemm_q_few, (tiles, split), tensors, constants, warps=c["K_WARPS"] * c["ROW_WARPS"],
            moved=moved, scratch={"partial": "*fp32", "counter": "*i32"},
        )  # fmt: skip
        why = f"{scheme(v, k)}, {bn} rows of codes a program" + (f", K in {split}" if split > 1 else "")
        why += f", {tuned.note}" if tuned else ", modelled"
        cost = tuned.us if tuned else modelled_us(moved, site.arch, efficiency=0.6)
        if tuned is None or tuned.note != "tuned":  # other rows say how long the codes take, not the sums
            cost = max(cost, FIRST_US + n * k * m / SUMS)
        return Selection((made,), why, cost)


KERNEL = GemmQFew()
TWIN = gemm_q_few_twin
"""What Triton's interpreter runs in its place."""
