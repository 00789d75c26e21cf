"""``gemm_q_few`` in Triton: what its Gluon form computes, for Triton's interpreter, which runs no Gluon."""

from __future__ import annotations

import triton
import triton.language as tl

from ._dequantize import numbers
from .gemm import finish


@triton.jit
def weight_row(tile, i, N: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr):
    """Row of the weight of line i of a tile: with a gate, the first half are gates and the second their ups."""
    if GATE is None:
        row = tile * BN + i
        row = tl.where(row < N, row, 0)
    else:
        HALF: tl.constexpr = BN // 2
        row = tile * HALF + i % HALF
        row = tl.where(row < N // 2, row, 0) + i // HALF * (N // 2)
    return row


@triton.jit
def gemm_q_few_twin(
    x, codes, scales, zeros, bias, residual, out, partial, counter, M,
    N: tl.constexpr, K: tl.constexpr, X_ROW: tl.constexpr, GATE: tl.constexpr, FORM: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    K_WARPS: tl.constexpr, ROW_WARPS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, as ``gemm_q_few`` says, a chunk at a time."""
    HALVES: tl.constexpr = CHUNK // PARTS
    STEP: tl.constexpr = K_WARPS * DEPTH
    SHARE: tl.constexpr = (K // CHUNK + STEP * SPLIT - 1) // (STEP * SPLIT) * STEP
    tile = tl.program_id(0)
    begin = tl.program_id(1) * SHARE
    row = weight_row(tile, tl.arange(0, BN), N, BN, GATE)
    m = tl.arange(0, BM)
    word = tl.arange(0, HALVES // 2)
    codes_at = codes + row.to(tl.int64)[:, None] * (K // PARTS // 2) + word[None, :]
    x_at = x + tl.where(m < M, m, 0)[:, None] * X_ROW + 2 * word[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for chunk in range(begin, tl.minimum(begin + SHARE, K // CHUNK)):
        words = tl.load(codes_at + chunk * (HALVES // 2))
        entry = chunk * CHUNK // GROUP * (N // SHARED)
        found = tl.zeros((BN, BM), tl.float32)
        for i in tl.static_range(2 * PARTS):
            halves = ((words >> (i % 2 * 16)) & 0xFFFF).to(tl.int16)
            a = tl.load(x_at + chunk * CHUNK + i // 2 * HALVES + i % 2)
            w = values(halves, zeros, entry + row, FORM, i // 2, a.dtype)
            found = tl.dot(w, tl.trans(a), found)
        if GROUP != K:
            found *= tl.load(scales + entry + row // SHARED).to(tl.float32)[:, None]
        acc += found
    if SPLIT > 1:
        spot = partial + (tile * SPLIT).to(tl.int64) * (BN * BM) + tl.arange(0, BN)[:, None] * BM + m[None, :]
        tl.store(spot + tl.program_id(1) * (BN * BM), acc)
        if tl.atomic_add(counter + tile, 1) == SPLIT - 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for i in range(SPLIT):
                acc += tl.load(spot + i * (BN * BM))
            store(acc, scales, bias, residual, out, tile, row, m, M, N, K, BN, SHARED, GROUP, GATE)
            tl.store(counter + tile, 0)
    else:
        store(acc, scales, bias, residual, out, tile, row, m, M, N, K, BN, SHARED, GROUP, GATE)


@triton.jit
def values(halves, zeros, at, FORM: tl.constexpr, PART: tl.constexpr, DTYPE: tl.constexpr):
    """Codes number PART of halfwords (rows, columns), less their zero points."""
    if FORM == "int8":
        found = numbers(halves, PART, 8, "int", DTYPE)
    elif FORM == "fp8_e4m3":
        found = numbers(halves, PART, 8, "fp8_e4m3", DTYPE)
    else:
        found = numbers(halves, PART, 4, "int", DTYPE)
        if zeros is not None:
            found = (found.to(tl.float32) + (8 - tl.load(zeros + at).to(tl.float32))[:, None]).to(DTYPE)
    return found


@triton.jit
def store(
    acc, scales, bias, residual, out, tile, row, m, M, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
    SHARED: tl.constexpr, GROUP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile's sums (BN, BM)."""
    if GROUP == K:
        acc *= tl.load(scales + row // SHARED).to(tl.float32)[:, None]
    total = tl.trans(acc)
    if GATE is None:
        finish(total, total, bias, residual, out, m, tile * BN + tl.arange(0, BN), M, N, GATE)
    else:
        HALF: tl.constexpr = BN // 2
        gates, ups = tl.split(tl.permute(tl.reshape(total, (total.shape[0], 2, HALF)), (0, 2, 1)))
        finish(gates, ups, bias, residual, out, m, tile * HALF + tl.arange(0, HALF), M, N // 2, GATE)
