"""Quantized weights: scheme, codes, scales and zeros as lazy weights; and round-to-nearest that streams."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmopt.errors import CheckpointError
from llmopt.ir.ops.linear import dequantize
from llmopt.ir.weights import Sliced, Weight
from llmopt.program import WeightPart

ELEMENTS = 1 << 22
"""Elements quantized at a time: 16 MiB of fp32, a few of which are alive."""

FP8_MAX = 448.0
"""Largest finite value of FP8 E4M3."""

RECENT = 4
"""Tensors whose scales stay in memory: enough for a writer that takes codes, scales and zeros in turn."""

Format = Literal["int", "fp8_e4m3", "mxfp4"]


@dataclass(frozen=True)
class Scheme:
    """How a matrix (N, K) is quantized: value = (code - zero) * scale, one scale a block of block_n × block_k.

    ``int``: uint8 codes of ``bits`` bits, zero 2^(bits-1) when ``symmetric``, else stored as uint8.
    ``fp8_e4m3``: codes float8_e4m3fn; ``mxfp4``: uint8 E2M1 codes; both symmetric. ``permuted``: a g_idx names
    each column's scale column (activation-ordered GPTQ). K runs along the last axis; leading axes (experts) are
    independent matrices.
    """

    format: Format = "int"
    bits: int = 8
    block_n: int = 1
    block_k: int = 128
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32
    permuted: bool = False

    def __post_init__(self) -> None:
        bits = {"int": range(2, 9), "fp8_e4m3": (8,), "mxfp4": (4,)}[self.format]
        if self.bits not in bits or min(self.block_n, self.block_k) < 1:
            raise ValueError(f"no scheme {self.format} of {self.bits} bits, block {self.block_n}×{self.block_k}")
        if self.format != "int" and not self.symmetric:
            raise ValueError(f"{self.format} has no zero points")

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of the codes."""
        return torch.float8_e4m3fn if self.format == "fp8_e4m3" else torch.uint8

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of scales and zeros for a weight of ``shape``. Raises ValueError when the block does not divide."""
        *lead, n, k = shape
        if n % self.block_n or (k % self.block_k and not self.permuted):
            raise ValueError(f"blocks of {self.block_n}×{self.block_k} do not divide {n}×{k}")
        return (*lead, n // self.block_n, -(-k // self.block_k))


@dataclass(frozen=True)
class QuantTensor:
    """A quantized weight: codes (..., N, K), scales and zeros (..., N/block_n, K/block_k), g_idx (K,) int32."""

    codes: Weight
    scales: Weight
    zeros: Weight | None
    g_idx: Weight | None
    scheme: Scheme

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, that of the codes."""
        return self.codes.shape

    @property
    def nbytes(self) -> float:
        """Bytes when codes are packed to their bits."""
        extra = [w.nbytes for w in (self.scales, self.zeros, self.g_idx) if w is not None]
        return self.codes.nbytes * self.scheme.bits / 8 + sum(extra)

    def parts(self) -> tuple[WeightPart, ...]:
        """The checkpoint tensors in the codes' rows."""
        return self.codes.parts()

    def dequantize(self) -> Tensor:
        """fp32 values, (..., N, K)."""
        shape, scheme = self.shape, self.scheme
        codes = self.codes.tensor().reshape(-1, shape[-1])
        scales = self.scales.tensor().reshape(-1, self.scales.shape[-1])
        zeros = None if self.zeros is None else self.zeros.tensor().reshape(scales.shape)
        g_idx = None if self.g_idx is None else self.g_idx.tensor()
        flat = dequantize(codes, scales, zeros, g_idx, scheme.format, scheme.bits, scheme.block_n, scheme.block_k)
        return flat.reshape(shape)

    def shard(self, axis: int, start: int, stop: int) -> QuantTensor:
        """Rows (axis -2: column-parallel layers) or columns (axis -1: row-parallel ones) [start, stop).

        Leading axes (experts) by their own index. Raises ValueError when a bound cuts a block; columns of a permuted
        tensor take its whole scales, as any column may use any of them.
        """
        axis %= len(self.shape)
        columns, rows = axis == len(self.shape) - 1, axis == len(self.shape) - 2
        block = self.scheme.block_k if columns else self.scheme.block_n if rows else 1
        codes = Sliced(self.codes, axis, start, stop)
        if columns and self.g_idx is not None:
            return replace(self, codes=codes, g_idx=Sliced(self.g_idx, 0, start, stop))
        if start % block or stop % block:
            raise ValueError(f"[{start}, {stop}) cuts a block of {block}")
        bounds = axis, start // block, stop // block
        zeros = None if self.zeros is None else Sliced(self.zeros, *bounds)
        return replace(self, codes=codes, scales=Sliced(self.scales, *bounds), zeros=zeros)


@dataclass(frozen=True)
class QuantPart(Weight):
    """Codes, scales or zeros of a tensor that is quantized while it is read."""

    source: RoundToNearest
    kind: Literal["codes", "scales", "zeros"]

    def __post_init__(self) -> None:
        scheme, shape = self.source.scheme, self.source.weight.shape
        dtypes = {"codes": scheme.code_dtype, "scales": scheme.scale_dtype, "zeros": torch.uint8}
        object.__setattr__(self, "shape", shape if self.kind == "codes" else scheme.scale_shape(shape))
        object.__setattr__(self, "dtype", dtypes[self.kind])

    def read(self, start: int, stop: int) -> Tensor:
        if self.kind == "codes":
            return self.source.codes(start, stop)
        return self.source.stats(self.kind, start, stop)

    def parts(self) -> tuple[WeightPart, ...]:
        whole = self.kind == "codes" or self.shape[0] == self.source.weight.shape[0]
        return self.source.weight.parts() if whole else ()


class RoundToNearest:
    """Quantizes a weight (..., N, K) to integers or FP8 while it is read, in pieces of ELEMENTS.

    Symmetric: scale = max|w| / 2^(bits-1), the top of the range clipped to 2^(bits-1) - 1 steps. With zero points:
    scale = (max - min) / (2^bits - 1) over a range that includes 0, zero = round(-min / scale). FP8: scale =
    max|w| / 448. Ties round to even. Scales are rounded to the scheme's dtype before they are used, so codes fit the
    scale that is stored.

    Scales and zeros found on the way are kept for the RECENT tensors read last: a writer that reads codes, then
    scales, then zeros measures the source once.
    """

    _recent: ClassVar[OrderedDict[int, RoundToNearest]] = OrderedDict()

    def __init__(self, name: str, weight: Weight, scheme: Scheme) -> None:
        """``name`` is blamed for values that are not finite. Raises ValueError when the block does not divide."""
        if scheme.format == "mxfp4" or scheme.permuted:
            raise ValueError("round-to-nearest makes integers and fp8 with scales in column order")
        self.name, self.weight, self.scheme = name, weight, scheme
        self.stat_shape = scheme.scale_shape(weight.shape)
        self.step = scheme.block_n if len(weight.shape) == 2 else 1
        self._kept: dict[str, Tensor] = {}

    def tensor(self) -> QuantTensor:
        """The quantized weight; nothing is read yet."""
        zeros = None if self.scheme.symmetric else QuantPart(self, "zeros")
        return QuantTensor(QuantPart(self, "codes"), QuantPart(self, "scales"), zeros, None, self.scheme)

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes of rows [start, stop) of axis 0."""
        out = torch.empty((stop - start, *self.weight.shape[1:]), dtype=self.scheme.code_dtype)
        for low, high, blocks in self._pieces(start, stop):
            scale, zero = self._measure(low, high, blocks)
            codes = round_codes(blocks, spread(scale), spread(zero), self.scheme)
            first, last = max(low, start), min(high, stop)
            piece = codes.reshape(high - low, *self.weight.shape[1:])[first - low : last - low]
            out[first - start : last - start] = piece
        return out

    def stats(self, kind: Literal["scales", "zeros"], start: int, stop: int) -> Tensor:
        """Scales or zeros, rows [start, stop) of their own axis 0."""
        kept = self._buffers()
        if not bool(kept["known"][start:stop].all()):
            for low, high, blocks in self._pieces(start * self.step, stop * self.step):
                self._measure(low, high, blocks)
        return kept[kind][start:stop].clone()

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Rows covering [start, stop), whole blocks each, as fp32 (..., N/block_n, block_n, K/block_k, block_k)."""
        row = torch.Size(self.weight.shape[1:]).numel()
        size = max(1, ELEMENTS // (row * self.step)) * self.step
        first, last = start - start % self.step, stop + -stop % self.step
        for low in range(first, last, size):
            high = min(low + size, last)
            values = self.weight.read(low, high).to(torch.float32, copy=True)
            *lead, n, k = values.shape
            block_n, block_k = self.scheme.block_n, self.scheme.block_k
            yield low, high, values.reshape(*lead, n // block_n, block_n, k // block_k, block_k)

    def _measure(self, low: int, high: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 scales and zeros of a piece, kept for ``stats``."""
        kept, rows = self._buffers(), slice(low // self.step, high // self.step)
        if not bool(kept["known"][rows].all()):
            scale, zero = block_range(blocks, self.scheme)
            if not bool(scale.isfinite().all()):
                raise CheckpointError("weights hold NaN or infinity", where=f"tensor {self.name}")
            kept["scales"][rows], kept["zeros"][rows], kept["known"][rows] = scale, zero.to(torch.uint8), True
        return kept["scales"][rows].float(), kept["zeros"][rows].float()

    def _buffers(self) -> dict[str, Tensor]:
        recent = RoundToNearest._recent
        recent[id(self)] = self
        recent.move_to_end(id(self))
        while len(recent) > RECENT:
            recent.popitem(last=False)[1]._kept = {}
        if not self._kept:
            dtypes = {"scales": self.scheme.scale_dtype, "zeros": torch.uint8}
            self._kept = {name: torch.zeros(self.stat_shape, dtype=dtype) for name, dtype in dtypes.items()}
            self._kept["known"] = torch.zeros(self.stat_shape[0], dtype=torch.bool)
        return self._kept


def block_range(blocks: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scales (fp32 values of the scheme's dtype) and zeros of blocks (..., N/block_n, block_n, K/block_k, block_k)."""
    low, high = blocks.amin((-3, -1)), blocks.amax((-3, -1))
    if scheme.format == "fp8_e4m3":
        scale = torch.maximum(-low, high) / FP8_MAX
    elif scheme.symmetric:
        scale = torch.maximum(-low, high) / 2 ** (scheme.bits - 1)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (2**scheme.bits - 1)
    info = torch.finfo(scheme.scale_dtype)
    smallest = info.smallest_normal * info.eps  # below it a scale would be stored as 0
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=smallest)).to(scheme.scale_dtype).float()
    if scheme.format == "fp8_e4m3":
        return scale, torch.zeros_like(scale)
    if scheme.symmetric:
        return scale, torch.full_like(scale, 2 ** (scheme.bits - 1))
    return scale, (-low / scale).round().clamp(0, 2**scheme.bits - 1)


def round_codes(values: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Codes of fp32 values under scales and zeros that broadcast with them, in the scheme's dtype."""
    if scheme.format == "fp8_e4m3":
        return (values / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (values / scale).round_().add_(zero).clamp_(0, 2**scheme.bits - 1).to(torch.uint8)


def spread(stat: Tensor) -> Tensor:
    """A statistic (..., N, K) over the elements of its blocks (..., N, 1, K, 1)."""
    return stat[..., :, None, :, None]
