"""Weights a checkpoint stores quantized: lazy values, and the codes below concatenations, stacks and transposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmopt.ir.quant import QuantTensor
from llmopt.ir.weights import Cast, Concat, ConcatColumns, Stack, Transposed, Weight
from llmopt.program import WeightPart


@dataclass(frozen=True)
class Dequantized(Weight):
    """The values of a QuantTensor (..., N, K), fp32; ``name`` is the checkpoint's for the whole weight."""

    name: str
    quant: QuantTensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.quant.shape)
        object.__setattr__(self, "dtype", torch.float32)

    def read(self, start: int, stop: int) -> Tensor:
        block = self.quant.scheme.block_n if len(self.shape) == 2 else 1
        low, high = start - start % block, stop + -stop % block
        return self.quant.shard(0, low, high).dequantize()[start - low : stop - low]

    def parts(self) -> tuple[WeightPart, ...]:
        return (WeightPart(self.name, 0, self.rows),)


@dataclass(frozen=True)
class Repeated(Weight):
    """Each row of axis -2 ``rows`` times and each column ``columns`` times, cut to ``to`` = (n, k)."""

    source: Weight
    rows_each: int
    columns_each: int
    to: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (*self.source.shape[:-2], *self.to))
        object.__setattr__(self, "dtype", self.source.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        if len(self.shape) > 2:
            rows = self.source.read(start, stop).repeat_interleave(self.rows_each, -2)[..., : self.to[0], :]
        else:
            low = start // self.rows_each
            rows = self.source.read(low, -(-stop // self.rows_each)).repeat_interleave(self.rows_each, 0)
            rows = rows[start - low * self.rows_each :][: stop - start]
        return rows.repeat_interleave(self.columns_each, -1)[..., : self.to[1]].contiguous()


def stored_codes(weight: Weight) -> QuantTensor | None:
    """The QuantTensor whose values ``weight`` holds, cast to any dtype; None when it was not stored quantized, or its
    parts differ in scheme or order of columns.
    """
    match weight:
        case Dequantized():
            return weight.quant
        case Cast(source=inner) | Transposed(source=Transposed(source=inner) | Cast(source=Transposed(source=inner))):
            return stored_codes(inner)
        case Concat():
            return _joined(weight.sources, Concat)
        case ConcatColumns() if len(weight.shape) == 3:
            return _joined(weight.sources, ConcatColumns)  # rows of each expert
        case Stack():
            return _joined(weight.sources, Stack)
    return None


def holds_codes(weight: Weight) -> str | None:
    """The name of a tensor stored quantized that ``weight`` is made of, if any."""
    if isinstance(weight, Dequantized):
        return weight.name
    below = [getattr(weight, "source", None), *getattr(weight, "sources", ())]
    return next((name for w in below if w is not None and (name := holds_codes(w))), None)


def _joined(sources: Sequence[Weight], join: Callable[[tuple[Weight, ...]], Weight]) -> QuantTensor | None:
    found = [tensor for source in sources if (tensor := stored_codes(source)) is not None]
    if len(found) < len(sources) or not joinable(found) or (join is Stack and found[0].g_idx is not None):
        return None
    return join_rows(found, join)


def joinable(tensors: Sequence[QuantTensor]) -> bool:
    """Whether tensors have one scheme, one width and one order of columns; reads g_idx, nothing else."""
    first = tensors[0]
    if any(t.scheme != first.scheme or t.shape[-1] != first.shape[-1] for t in tensors):
        return False
    if len({t.g_idx is None for t in tensors}) > 1 or len({t.zeros is None for t in tensors}) > 1:
        return False
    return first.g_idx is None or all(torch.equal(t.g_idx.tensor(), first.g_idx.tensor()) for t in tensors)  # type: ignore[union-attr]


def join_rows(tensors: Sequence[QuantTensor], join: Callable[[tuple[Weight, ...]], Weight] = Concat) -> QuantTensor:
    """``joinable`` tensors as one."""
    zeros = None if tensors[0].zeros is None else join(tuple(t.zeros for t in tensors if t.zeros is not None))
    codes, scales = join(tuple(t.codes for t in tensors)), join(tuple(t.scales for t in tensors))
    return replace(tensors[0], codes=codes, scales=scales, zeros=zeros)
