"""Mixture of experts over int4, int8, FP8 or MXFP4 weights: the grouped products of moe.py on codes in registers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Selection, Strided
from ..pack import EXPERTS, STACKS, chunk_of, of_stack, parts_of
from ..tuning import quantized_form
from ._common import cdiv, modelled_us, nbytes, pdl_release, pdl_wait, pow2
from ._dequantize import numbers
from .gemm_q import add_group, as_loaded
from .moe import Product, find_tile, gated, read_mixture, tuning_key


@triton.jit
def multiply(
    acc, x_at, some, codes, scales, zeros, expert, row, K: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
    FORMAT: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """acc (BN, BM) + rows ``row`` of an expert's matrix (N, K) · x (BM, K)ᵀ; ``x_at`` (BM, 1): where the rows of x
    begin. codes, scales and zeros as in gemm_q, of each expert.
    """
    PARTS: tl.constexpr = codes.dtype.element_ty.primitive_bitwidth // BITS
    WIDE: tl.constexpr = BK // PARTS
    ROW: tl.constexpr = K // PARTS
    table = expert.to(tl.int64) * (N // SHARED * ((K + GROUP - 1) // GROUP))
    scales += table
    if zeros is not None:
        zeros += table
    h = tl.arange(0, WIDE)[None, :]
    c_at = codes + (expert.to(tl.int64) * N + row)[:, None] * ROW + h
    for start in range(0, K, BK):
        b = tl.load(c_at + start // PARTS, mask=start // PARTS + h < ROW, other=0)
        part = acc if GROUP == K else tl.zeros((BN, BM), tl.float32)
        sums = tl.zeros((BM, WIDE), tl.float32)
        for i in tl.static_range(PARTS):
            k = start + i * WIDE + h
            a = tl.load(x_at + k, mask=some & (k < K), other=0.0)
            if zeros is not None:
                sums += a.to(tl.float32)
            part = tl.dot(numbers(b, i, BITS, FORMAT, a.dtype), tl.trans(a), part)
        at = tl.minimum(start, K - 1) // GROUP * (N // SHARED) + row // SHARED
        acc = add_group(acc, part, sums, scales, zeros, at, BITS, GROUP == K)
    if GROUP == K:
        acc *= tl.load(scales + row // SHARED).to(tl.float32)[:, None]
    return acc


@triton.jit
def gate_up_experts_q(
    x, codes, scales, zeros, bias, order, starts, hidden,
    X_ROW: tl.constexpr, K: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, PE: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, FORMAT: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """gate_up_experts of moe.py, the weights (E, 2·WIDTH, C) as gemm_q has them. Floor: the chosen experts' codes."""
    pdl_release(PDL)
    pdl_wait(PDL)
    expert, first, end = find_tile(starts, tl.program_id(1), E, PE, BM)
    if expert < E:
        N: tl.constexpr = 2 * WIDTH
        m = first + tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        pair = tl.load(order + m, mask=m < end, other=0)
        OAI: tl.constexpr = KIND == "swiglu_oai"
        column = tl.where(n < WIDTH, n, 0)
        row_g = 2 * column if OAI else column
        row_u = 2 * column + 1 if OAI else column + WIDTH
        x_at = x + (pair // K).to(tl.int64)[:, None] * X_ROW
        some = (m < end)[:, None]
        nothing = tl.zeros((BN, BM), tl.float32)
        g = multiply(
            nothing, x_at, some, codes, scales, zeros, expert, row_g, C, N, BITS, FORMAT, SHARED, GROUP, BM, BN, BK
        )
        u = multiply(
            nothing, x_at, some, codes, scales, zeros, expert, row_u, C, N, BITS, FORMAT, SHARED, GROUP, BM, BN, BK
        )
        if bias is not None:
            g += tl.load(bias + expert * N + row_g).to(tl.float32)[:, None]
            u += tl.load(bias + expert * N + row_u).to(tl.float32)[:, None]
        h = gated(g, u, KIND)
        at = hidden + m[None, :].to(tl.int64) * WIDTH + n[:, None]
        tl.store(at, h.to(hidden.dtype.element_ty), mask=(n < WIDTH)[:, None] & (m < end)[None, :])


@triton.jit
def down_experts_q(
    hidden, codes, scales, zeros, bias, share, order, starts, parts,
    C: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, PE: tl.constexpr,
    BITS: tl.constexpr, FORMAT: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """down_experts of moe.py, the weights (E, C, WIDTH) as gemm_q has them."""
    pdl_release(PDL)
    pdl_wait(PDL)
    expert, first, end = find_tile(starts, tl.program_id(1), E, PE, BM)
    if expert < E:
        m = first + tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        pair = tl.load(order + m, mask=m < end, other=0)
        row, some = tl.where(n < C, n, 0), (m < end)[:, None]
        h_at = hidden + m[:, None].to(tl.int64) * WIDTH
        acc = tl.zeros((BN, BM), tl.float32)
        acc = multiply(
            acc, h_at, some, codes, scales, zeros, expert, row, WIDTH, C, BITS, FORMAT, SHARED, GROUP, BM, BN, BK
        )
        if bias is not None:
            acc += tl.load(bias + expert * C + row).to(tl.float32)[:, None]
        acc *= tl.load(share + pair, mask=m < end, other=0.0).to(tl.float32)[None, :]
        tl.store(parts + pair[None, :].to(tl.int64) * C + n[:, None], acc, mask=(n < C)[:, None] & (m < end)[None, :])


def shape_tiles(pairs: int, experts: int, chunk: int) -> dict[str, int]:
    """Tiles by how many pairs an expert gets on average. A step is a chunk of columns deep: short ones take more stages
    to keep as many bytes on their way."""
    rows = min(64, max(16, pow2(cdiv(pairs, experts))))
    return {"BM": rows, "BN": 64, "warps": 4 if rows <= 32 else 8, "stages": {128: 3, 64: 4, 32: 6}[chunk]}


def width_of(stack: Mapping[str, Any]) -> int:
    """Columns of the matrices of a stack, which are packed in bytes."""
    return int(stack["codes"].shape[-1] * 8 // stack["bits"])


def depth_of(stack: Mapping[str, Any]) -> int:
    """Columns of a step."""
    return chunk_of(stack["bits"], stack["block_k"], width_of(stack))


def product(function: Any, stack: Mapping[str, Any]) -> Product:
    """The grouped product with one stack of matrices (E, N, K)."""
    codes, bits, group, chunk = stack["codes"], stack["bits"], stack["block_k"], depth_of(stack)
    loaded = as_loaded(codes, parts_of(bits, chunk, width_of(stack)) * bits == 16)
    tensors = {"codes": loaded, **{name: stack[name] for name in ("scales", "zeros", "bias")}}
    constants = {
        "BITS": bits, "FORMAT": stack["format"], "SHARED": stack["block_n"], "GROUP": group, "BK": chunk,
    }  # fmt: skip
    return Product(function, tensors, constants, nbytes(codes, stack["scales"], stack["zeros"]))


@dataclass(frozen=True)
class QuantizedExperts:
    """``llmopt.moe_experts_q``: the four launches of moe.py."""

    name: str = "moe_q"
    ops: tuple[str, ...] = (EXPERTS,)

    def select(self, site: CallSite) -> Selection | str:
        gate_up, down = (of_stack(site.values, stack) for stack in STACKS)
        wide = unpacked(down)
        tables = [stack[name] for stack in (gate_up, down) for name in ("codes", "scales", "zeros")]
        mixture = read_mixture(site, wide, tables)
        if isinstance(mixture, str):
            return mixture
        form = quantized_form(gate_up, mixture.c)
        tuned = site.tuning.get(self.name, {}).get(tuning_key(form, mixture.index, wide))
        chunk = min(depth_of(gate_up), depth_of(down))
        t = dict(tuned) if tuned else shape_tiles(mixture.pairs, mixture.experts, chunk)
        launches = mixture.launches(site, t, product(gate_up_experts_q, gate_up), product(down_experts_q, down))
        moved = sum(item.bytes for item in launches)
        why = f"{form}, pairs sorted by expert, tiles of {t['BM']} pairs" + (", tuned" if tuned else ", modelled")
        return Selection(launches, why, t.get("us") or modelled_us(moved, site.arch, len(launches)))


def unpacked(stack: Mapping[str, Any]) -> Strided:
    """The codes of a stack, one an element."""
    codes: Strided = stack["codes"]
    (experts, n, _), k = codes.shape, width_of(stack)
    return replace(codes, shape=(experts, n, k), strides=(n * k, k, 1))


KERNEL = QuantizedExperts()
