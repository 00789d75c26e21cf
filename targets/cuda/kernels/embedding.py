"""Rows of a table by index: the token embedding, of numbers or of codes, and the rows whose logits are wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Selection, Strided
from ..pack import EMBEDDING, chunk_of, parts_of
from ._common import cdiv, launch, modelled_us, nbytes_of, pdl_release, pdl_wait, pow2, rows_of
from .gemm_q import as_loaded


@triton.jit
def take_rows(
    index, table, out, ROWS: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """out (T, C) = table[index]; table (ROWS, C) with ``STRIDE`` between rows; index (T,) int64.

    An index outside the table (a padding row's) reads row 0. Floor: 2·T·C elements of traffic.
    """
    pdl_release(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl_wait(PDL)
    at = tl.load(index + row)
    at = tl.where((at >= 0) & (at < ROWS), at, 0)
    tl.store(out + row * C + c, tl.load(table + at * STRIDE + c, mask=c < C), mask=c < C)


@dataclass(frozen=True)
class TakeRows:
    """``aten.embedding`` and ``aten.index_select`` along the second to last dimension."""

    name: str = "take_rows"
    ops: tuple[str, ...] = ("aten.embedding.default", "aten.index_select.default")

    def select(self, site: CallSite) -> Selection | str:
        v = site.values
        table, index = self._operands(site.call.op, v)
        if table is None or index is None:
            return f"dimension {v['dim']} is not the rows"
        layout = rows_of(table)
        if layout is None or not index.contiguous or index.dtype != "int64":
            return "the table has strides no row stride expresses, or the index is not dense int64"
        (out,) = site.outputs
        c, (rows, stride) = out.shape[-1], layout
        count = math.prod(out.shape[:-1])
        block = min(pow2(c), 2048)
        moved = 2 * count * c * 2
        made = launch(
            site.arch,
            take_rows,
            (count, cdiv(c, block)),
            {"index": index, "table": table, "out": out},
            {"ROWS": rows, "C": c, "STRIDE": stride, "BLOCK": block},
            moved=moved,
        )
        return Selection((made,), "copies rows", modelled_us(moved, site.arch))

    def _operands(self, op: str, v: Any) -> tuple[Strided | None, Strided | None]:
        if op == "aten.embedding.default":
            return v["weight"], v["indices"]
        x = v["self"]
        rows_only = v["dim"] % len(x.shape) == len(x.shape) - 2 and all(d == 1 for d in x.shape[:-2])
        return (x, v["index"]) if rows_only else (None, None)


@triton.jit
def take_rows_q(
    index, codes, scales, zeros, out, ROWS: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, FORMAT: tl.constexpr,
    SHARED: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (T, C) = rows ``index`` of the table (ROWS, C) that codes, scales and zeros stand for, as in gemm_q.

    An index outside the table reads row 0. Floor: T·C codes read, T·C elements written.
    """
    PARTS: tl.constexpr = codes.dtype.element_ty.primitive_bitwidth // BITS
    WIDE: tl.constexpr = CHUNK // PARTS
    pdl_release(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < C
    pdl_wait(PDL)
    at = tl.load(index + row)
    at = tl.where((at >= 0) & (at < ROWS), at, 0)
    element = tl.load(codes + at * (C // PARTS) + c // CHUNK * WIDE + c % WIDE, mask=live, other=0).to(tl.int32)
    code = (element >> (c % CHUNK // WIDE * BITS)) & ((1 << BITS) - 1)
    table = c // GROUP * (ROWS // SHARED) + at // SHARED
    if FORMAT == "fp8_e4m3":
        exponent, mantissa = (code >> 3) & 15, (code & 7).to(tl.float32)
        power = ((tl.maximum(exponent, 1) + 117) << 23).to(tl.float32, bitcast=True)
        value = tl.where(exponent > 0, mantissa + 8, mantissa) * power
        value = tl.where(code >= 128, -value, value)
    else:
        value = (code ^ 128 if BITS == 8 else code).to(tl.float32)
        if zeros is None:
            value -= 1 << (BITS - 1)
        else:
            value -= tl.load(zeros + table, mask=live, other=0).to(tl.float32)
    value *= tl.load(scales + table, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, value.to(out.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class TakeQuantizedRows:
    """``llmopt.embedding_q`` of int4, int8 and FP8 tables."""

    name: str = "take_rows_q"
    ops: tuple[str, ...] = (EMBEDDING,)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        codes, index, bits, group, (out,) = v["codes"], v["indices"], v["bits"], v["block_k"], site.outputs
        if not index.contiguous or index.dtype != "int64":
            return "the index is not dense int64"
        if v["format"] == "mxfp4":
            return "no table is MXFP4"
        c, rows = out.shape[-1], codes.shape[0]
        chunk = chunk_of(bits, group, c)
        loaded = as_loaded(codes, codes.dtype == "uint8" and parts_of(bits, chunk, c) * bits == 16)
        count, block = math.prod(out.shape[:-1]), min(pow2(c), 2048)
        moved = count * c * bits // 8 + count * c * nbytes_of(out)
        constants = {
            "ROWS": rows, "C": c, "BITS": bits, "FORMAT": v["format"], "SHARED": v["block_n"], "GROUP": group,
            "CHUNK": chunk, "BLOCK": block,
        }  # fmt: skip
        tensors = {"index": index, "codes": loaded, "scales": v["scales"], "zeros": v["zeros"], "out": out}
        made = launch(site.arch, take_rows_q, (count, cdiv(c, block)), tensors, constants, moved=moved)
        return Selection((made,), "makes numbers of rows of codes", modelled_us(moved, site.arch))


KERNELS = (TakeRows(), TakeQuantizedRows())
