"""Packing of quantized weights for MatMulNBits, and its exact inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
MIN_BLOCK = 16
MAX_BLOCK = 256


def container(bits: int) -> int:
    """Bits a code occupies: MatMulNBits has CPU kernels for 4 and 8."""
    return 4 if bits <= 4 else 8


def kernel_block(block_k: int, columns: int) -> int | None:
    """Block size MatMulNBits runs a group of ``block_k`` columns with (None: it cannot).

    A power of two of 16 to 256 that divides the group, or for one group a row the whole row up to its padding:
    the scale is repeated, so the values stay the same.
    """
    if block_k >= columns:
        fits = [b for b in (128, 64, 32, MIN_BLOCK) if columns % b == 0]
        return fits[0] if fits else MIN_BLOCK
    size = block_k & -block_k
    return min(size, MAX_BLOCK) if size >= MIN_BLOCK else None


def pack_codes(codes: Codes, bits: int, block: int, pad: int = 0) -> Codes:
    """Codes (n, K) → (n, ceil(K / block), block * bits / 8), low bits first; the last block is filled with ``pad``."""
    rows, columns = codes.shape
    blocks = -(-columns // block)
    full = np.full((rows, blocks * block), pad, np.uint8)
    full[:, :columns] = codes
    return _pack(full, bits).reshape(rows, blocks, block * bits // 8)


def unpack_codes(packed: Codes, bits: int, columns: int) -> Codes:
    """Inverse of pack_codes: (n, blocks, blob) → (n, K)."""
    return _unpack(packed.reshape(packed.shape[0], -1), bits)[:, :columns]


def pack_zeros(zeros: Codes, bits: int) -> Codes:
    """Zero points (n, blocks) → (n, ceil(blocks * bits / 8)), low bits first."""
    per_byte = 8 // bits
    rows, blocks = zeros.shape
    full = np.zeros((rows, -(-blocks // per_byte) * per_byte), np.uint8)
    full[:, :blocks] = zeros
    return _pack(full, bits)


def unpack_zeros(packed: Codes, bits: int, blocks: int) -> Codes:
    """Inverse of pack_zeros."""
    return _unpack(packed, bits)[:, :blocks]


def spread(groups: npt.NDArray[Any], block_k: int, block: int, columns: int) -> npt.NDArray[Any]:
    """Per-group values (n, ceil(K / block_k)) repeated for each kernel block: (n, ceil(K / block))."""
    first_column = np.arange(-(-columns // block)) * block
    return np.ascontiguousarray(groups[:, first_column // block_k])


def nibbles(codes: Codes) -> tuple[Codes, Codes]:
    """High and low half of 8-bit codes: ``code = 16 * high + low``."""
    return codes >> np.uint8(4), codes & np.uint8(15)


def _pack(codes: Codes, bits: int) -> Codes:
    if bits == 8:
        return codes
    per_byte = 8 // bits
    lanes = codes.reshape(codes.shape[0], -1, per_byte)
    result = np.zeros(lanes.shape[:2], np.uint8)
    for i in range(per_byte):
        result |= lanes[:, :, i] << np.uint8(i * bits)
    return result


def _unpack(packed: Codes, bits: int) -> Codes:
    if bits == 8:
        return packed
    mask = np.uint8((1 << bits) - 1)
    lanes = [(packed >> np.uint8(i * bits)) & mask for i in range(8 // bits)]
    return np.stack(lanes, axis=-1).reshape(packed.shape[0], -1)
