"""Writes quantized checkpoints by the definition of each format; shares nothing with the code that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid: codes (N, K) from 0, scales and zeros (N, G), each column's group (K,)."""

    codes: Codes
    scales: Tensor
    zeros: Codes
    groups: Codes

    def values(self) -> Tensor:
        """(code - zero) · scale, fp32, in fp64 until the end."""
        steps = torch.from_numpy(self.codes - self.zeros[:, self.groups]).double()
        return (steps * self.scales.double()[:, torch.from_numpy(self.groups)]).float()


def rounded(w: Tensor, bits: int, group: int, symmetric: bool, shuffle: int | None = None) -> Rounded:
    """A matrix rounded to the nearest point of its group's grid; ``shuffle`` seeds the groups' order of columns."""
    n, k = w.shape
    groups = np.arange(k) // group
    if shuffle is not None:
        groups = np.random.default_rng(shuffle).permutation(groups)
    top = 2**bits - 1
    scales, zeros = np.zeros((n, groups.max() + 1)), np.zeros((n, groups.max() + 1))
    values = w.double().numpy()
    for g in range(groups.max() + 1):
        low, high = values[:, groups == g].min(1).clip(max=0), values[:, groups == g].max(1).clip(min=0)
        if symmetric:
            scales[:, g] = 2 * np.maximum(-low, high) / top
            zeros[:, g] = 2 ** (bits - 1)
        else:
            scales[:, g] = (high - low) / top
            zeros[:, g] = np.clip(np.rint(-low / scales[:, g]), 1, top)
    stored = torch.from_numpy(scales).half()
    grid = stored.double().numpy()[:, groups]
    codes = np.clip(np.rint(values / grid + zeros[:, groups]), 0, top).astype(np.int64)
    return Rounded(codes, stored, zeros.astype(np.int64), groups)


def stream(values: Codes, bits: int) -> npt.NDArray[np.int32]:
    """Each row of small integers as one long number, lowest first, cut into 32-bit words."""
    rows = []
    for row in values:
        number = 0
        for value in reversed(row.tolist()):
            number = number << bits | value
        rows.append(np.frombuffer(number.to_bytes(-(-len(row) * bits // 32) * 4, "little"), "<i4"))
    return np.stack(rows)


def words(values: npt.NDArray[np.int32]) -> Tensor:
    """Packed words as a tensor of their own."""
    return torch.from_numpy(np.ascontiguousarray(values).copy())


def gptq(r: Rounded, bits: int, version: int) -> Tensors:
    """qweight packed along K, qzeros along N (less one in version 1), scales (G, N), g_idx."""
    zeros = (r.zeros - (1 if version == 1 else 0)) % 2**bits
    return {
        ".qweight": words(stream(r.codes, bits).T),
        ".qzeros": words(stream(zeros.T, bits)),
        ".scales": r.scales.T.contiguous(),
        ".g_idx": torch.from_numpy(r.groups.astype(np.int32)),
    }


def awq(r: Rounded) -> Tensors:
    """qweight (K, N/8): the eight codes of a word in the order 0 2 4 6 1 3 5 7, lowest nibble first."""

    def pack(values: Codes) -> Tensor:
        out = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for nibble, feature in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= (values[:, feature::8] << 4 * nibble).astype(np.uint32)
        return words(out.view(np.int32))

    return {".qweight": pack(r.codes.T), ".qzeros": pack(r.zeros.T), ".scales": r.scales.T.contiguous()}


def pack_quantized(r: Rounded, bits: int, symmetric: bool, act_order: bool) -> Tensors:
    """compressed-tensors' weight_packed (N, K·bits/32) and, when needed, zero points packed along N and g_idx."""
    found = {
        ".weight_packed": words(stream(r.codes, bits)),
        ".weight_shape": torch.tensor(r.codes.shape),
        ".weight_scale": r.scales,
    }
    if not symmetric:
        found[".weight_zero_point"] = words(stream(r.zeros.T, bits).T)
    if act_order:
        found[".weight_g_idx"] = torch.from_numpy(r.groups.astype(np.int32))
    return found


def int8(r: Rounded, symmetric: bool) -> Tensors:
    """compressed-tensors' int8 weight (N, K), scale and zero point (N, G)."""
    found = {".weight": torch.from_numpy((r.codes - 128).astype(np.int8)), ".weight_scale": r.scales}
    if not symmetric:
        found[".weight_zero_point"] = torch.from_numpy((r.zeros - 128).astype(np.int8))
    return found


def fp8(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 codes, scales (⌈N/b⌉, ⌈K/b⌉) fp32 and values of a matrix, block by block."""
    n, k = w.shape
    rows, columns = block
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    scales, values = torch.empty(-(-n // rows), -(-k // columns)), torch.empty(n, k)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = w[at].abs().max() / 448
            codes[at] = (w[at] / scales[i, j]).to(torch.float8_e4m3fn)
            values[at] = (codes[at].double() * scales[i, j].double()).float()
    return codes, scales, values


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks (E, N, K/32, 16), exponents (E, N, K/32) and values (E, N, K) of experts' matrices."""
    e, n, k = w.shape
    parts = w.double().reshape(e, n, k // 32, 32).numpy()
    exponent = np.floor(np.log2(np.abs(parts).max(-1, keepdims=True))) - 2
    points = np.array([*E2M1, *(-p for p in E2M1)])
    codes = np.abs((parts / 2.0**exponent)[..., None] - points).argmin(-1)
    values = points[codes] * 2.0**exponent
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    stored = (exponent[..., 0] + 127).astype(np.uint8)
    return torch.from_numpy(blocks), torch.from_numpy(stored), torch.from_numpy(values).float().reshape(e, n, k)


Pack = Callable[[str, Tensor], tuple[Tensors, Tensor]]
"""A layer's name and weight to its tensors, by the ends of their names, and the values they stand for."""


def write(plain: Path, quantized: Path, dequantized: Path, pack: Pack, config: dict[str, Any]) -> None:
    """Two checkpoints from one: linears packed, and linears at the values the packed ones stand for."""
    tensors = load_file(plain / "model.safetensors")
    packed, values = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.endswith(("_proj", ".w1", ".w2", ".w3")):
            found, values[name] = pack(stem, weight)
            del packed[name]
            packed |= {stem + leaf: tensor for leaf, tensor in found.items()}
    save(packed, plain, quantized, config)
    save(values, plain, dequantized, None)


def save(tensors: Tensors, plain: Path, folder: Path, quantization: dict[str, Any] | None) -> None:
    """A checkpoint folder with the config of ``plain``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((plain / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
