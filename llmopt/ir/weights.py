"""The weight table: lazy tensors by name, composed of transforms, read in row chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.ir.samples import CPU
from llmopt.program import WeightPart


class Weight(ABC):
    """A tensor that is not in memory: shape, dtype, and rows of axis 0 on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of axis 0. Raises CheckpointError naming the tensor and file."""

    def parts(self) -> tuple[WeightPart, ...]:
        """The checkpoint tensors this weight is made of, by rows (empty: not row-wise)."""
        return ()

    @property
    def rows(self) -> int:
        """Length of axis 0 (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes when materialized."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def tensor(self, device: torch.device = CPU) -> Tensor:
        """The whole tensor, on a device."""
        return self.read(0, self.rows).to(device)

    def chunks(self, max_bytes: int) -> Iterator[Tensor]:
        """Rows in order, each chunk at most ``max_bytes`` (at least one row)."""
        step = max(1, max_bytes // max(1, self.nbytes // max(1, self.rows)))
        for start in range(0, self.rows, step):
            yield self.read(start, min(self.rows, start + step))


@dataclass(frozen=True)
class Constant(Weight):
    """A small tensor in memory: a buffer computed when the model was constructed (inverse frequencies)."""

    value: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.value.shape))
        object.__setattr__(self, "dtype", self.value.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        return self.value[start:stop] if self.shape else self.value


@dataclass(frozen=True)
class Cast(Weight):
    """Another weight in a different dtype."""

    source: Weight
    to: torch.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.source.shape)
        object.__setattr__(self, "dtype", self.to)

    def read(self, start: int, stop: int) -> Tensor:
        return self.source.read(start, stop).to(self.to)

    def parts(self) -> tuple[WeightPart, ...]:
        return self.source.parts()


@dataclass(frozen=True)
class Transposed(Weight):
    """A weight with its last two axes swapped (Conv1D, gpt-oss experts)."""

    source: Weight

    def __post_init__(self) -> None:
        *head, a, b = self.source.shape
        object.__setattr__(self, "shape", (*head, b, a))
        object.__setattr__(self, "dtype", self.source.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        if len(self.shape) == 2:
            return self.source.tensor().t()[start:stop].contiguous()
        return self.source.read(start, stop).transpose(-1, -2).contiguous()


@dataclass(frozen=True)
class Column(Weight):
    """A vector (N,) as a table (N, 1)."""

    source: Weight

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (*self.source.shape, 1))
        object.__setattr__(self, "dtype", self.source.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        return self.source.read(start, stop)[:, None]

    def parts(self) -> tuple[WeightPart, ...]:
        return self.source.parts()


@dataclass(frozen=True)
class Concat(Weight):
    """Weights stacked along axis 0 (fused qkv, gate_up)."""

    sources: tuple[Weight, ...]

    def __post_init__(self) -> None:
        rows = sum(w.shape[0] for w in self.sources)
        object.__setattr__(self, "shape", (rows, *self.sources[0].shape[1:]))
        object.__setattr__(self, "dtype", self.sources[0].dtype)

    def read(self, start: int, stop: int) -> Tensor:
        pieces, offset = [], 0
        for source in self.sources:
            lo, hi = max(start - offset, 0), min(stop - offset, source.shape[0])
            if lo < hi:
                pieces.append(source.read(lo, hi))
            offset += source.shape[0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def parts(self) -> tuple[WeightPart, ...]:
        found, offset = [], 0
        for source in self.sources:
            found += [WeightPart(p.name, p.start + offset, p.rows) for p in source.parts()]
            offset += source.shape[0]
        return tuple(found)


@dataclass(frozen=True)
class Stack(Weight):
    """Weights of one shape as the slices of a new axis 0 (experts stored one by one)."""

    sources: tuple[Weight, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (len(self.sources), *self.sources[0].shape))
        object.__setattr__(self, "dtype", self.sources[0].dtype)

    def read(self, start: int, stop: int) -> Tensor:
        return torch.stack([source.tensor() for source in self.sources[start:stop]])


@dataclass(frozen=True)
class ConcatColumns(Weight):
    """Weights joined along axis 1 (the gate and up matrices of stacked experts)."""

    sources: tuple[Weight, ...]

    def __post_init__(self) -> None:
        head = self.sources[0].shape
        width = sum(w.shape[1] for w in self.sources)
        object.__setattr__(self, "shape", (head[0], width, *head[2:]))
        object.__setattr__(self, "dtype", self.sources[0].dtype)

    def read(self, start: int, stop: int) -> Tensor:
        return torch.cat([source.read(start, stop) for source in self.sources], dim=1)


@dataclass(frozen=True)
class Sliced(Weight):
    """[start, stop) of one axis of a weight: a rank's share."""

    source: Weight
    axis: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        shape = list(self.source.shape)
        if not 0 <= self.start <= self.stop <= shape[self.axis]:
            raise ValueError(f"[{self.start}, {self.stop}) lies outside axis {self.axis} of {tuple(shape)}")
        shape[self.axis] = self.stop - self.start
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "dtype", self.source.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        if self.axis == 0:
            return self.source.read(self.start + start, self.start + stop)
        return self.source.read(start, stop).narrow(self.axis, self.start, self.stop - self.start).contiguous()

    def parts(self) -> tuple[WeightPart, ...]:
        if self.axis != 0:
            return self.source.parts()
        found = []
        for part in self.source.parts():
            low, high = max(part.start, self.start), min(part.start + part.rows, self.stop)
            if low < high:
                found.append(WeightPart(part.name, low - self.start, high - low))
        return tuple(found)


@dataclass(frozen=True)
class Scaled(Weight):
    """``(weight + offset) * factor - offset``, in the weight's dtype; ``factor`` (n,) runs along one axis, or (E, n),
    one row an expert, along one of its matrices'.

    Exact but for one rounding to the dtype. ``offset``: what a norm adds to its weight before it multiplies.
    """

    source: Weight
    axis: int
    factor: Tensor
    offset: float = 0.0

    def __post_init__(self) -> None:
        lead = self.source.shape[:1] if self.factor.dim() == 2 else ()
        if self.factor.shape != (*lead, self.source.shape[self.axis]):
            raise ValueError(f"{tuple(self.factor.shape)} factors for axis {self.axis} of {self.source.shape}")
        object.__setattr__(self, "shape", self.source.shape)
        object.__setattr__(self, "dtype", self.source.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        axis = self.axis % len(self.shape)
        each = self.factor.dim() == 2
        factor = self.factor[start:stop] if axis == 0 or each else self.factor
        shape = [-1 if i == axis else 1 for i in range(len(self.shape))]
        if each:
            shape[0] = len(factor)
        factor = factor.reshape(shape)
        rows = self.source.read(start, stop).float()
        return ((rows + self.offset) * factor - self.offset).to(self.dtype)

    def parts(self) -> tuple[WeightPart, ...]:
        return self.source.parts()


@dataclass(frozen=True)
class Clipped(Weight):
    """A matrix (..., N, K) whose groups of columns are clipped to ± their limit; ``limits`` (..., N, groups)."""

    source: Weight
    limits: Weight

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.source.shape)
        object.__setattr__(self, "dtype", self.source.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        return self.of(self.source.read(start, stop), self.limits.read(start, stop)).to(self.dtype)

    @staticmethod
    def of(rows: Tensor, limits: Tensor) -> Tensor:
        """Values (..., N, K) clipped to ± limits (..., N, groups), fp32."""
        most = limits[..., None]
        return rows.float().reshape(*limits.shape, -1).clamp(-most, most).reshape(rows.shape)

    def parts(self) -> tuple[WeightPart, ...]:
        return self.source.parts()


def checkpoint_names(name: str, weight: Weight) -> tuple[str, ...]:
    """The checkpoint tensors a weight is made of, in order; ``name``, its own, where it does not say."""
    if isinstance(weight, Cast | Transposed | Sliced | Scaled | Clipped):
        return checkpoint_names(name, weight.source)
    if isinstance(weight, Concat | ConcatColumns):
        found = [n for source in weight.sources for n in checkpoint_names(name, source)]
        return tuple(dict.fromkeys(found))
    return tuple(dict.fromkeys(part.name for part in weight.parts())) or (name,)


WeightTable = dict[str, Weight]
