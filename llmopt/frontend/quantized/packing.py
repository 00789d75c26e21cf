"""Integers packed into int32 words, and lazy tensors decoded from stored ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from llmopt.errors import CheckpointError
from llmopt.frontend.shards import Stored
from llmopt.ir.weights import Weight
from llmopt.program import WeightPart

WORD = 32
"""Bits of a word."""


@dataclass(frozen=True)
class Decoded(Weight):
    """A tensor computed from stored ones: ``decode(start, stop)`` gives rows of axis 0.

    ``whole``: the checkpoint's name of the weight whose rows these are (None: they are not its rows).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Callable[[int, int], Tensor]
    whole: str | None = None

    def read(self, start: int, stop: int) -> Tensor:
        return self.decode(start, stop)

    def parts(self) -> tuple[WeightPart, ...]:
        return (WeightPart(self.whole, 0, self.rows),) if self.whole else ()


@dataclass(frozen=True)
class Scales(Weight):
    """Scales as they are stored, seen as ``shape`` (N, K) or (E, N, K), refused when one is zero.

    ``flipped``: stored (K, N).
    """

    source: Stored
    shape: tuple[int, ...]
    flipped: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.source.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        value = self._stored(start, stop)
        if not bool(value.all()):
            raise CheckpointError(
                f"tensor {self.source.name} holds scales of zero",
                where=str(self.source.file),
                hint="the checkpoint is damaged, or its quantizer did not clamp them",
            )
        return value

    def _stored(self, start: int, stop: int) -> Tensor:
        if self.flipped:
            return self.source.tensor()[:, start:stop].t().contiguous()
        if len(self.source.shape) == len(self.shape):
            return self.source.read(start, stop)
        return self.source.tensor().reshape(self.shape)[start:stop]


def unpack(words: Tensor, bits: int, axis: int, count: int) -> Tensor:
    """uint8 values packed into int32 ``words`` along ``axis``, lowest bits first, across the borders of words.

    The first ``count`` values are returned. No temporary is larger than ``words``.
    """
    words = words.movedim(axis, -1)
    period = WORD // gcd(WORD, bits)  # values until one starts at the start of a word again
    step = period * bits // WORD
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % step))
    values = torch.empty((*words.shape[:-1], words.shape[-1] // step * period), dtype=torch.uint8)
    for i in range(period):
        word, shift = divmod(i * bits, WORD)
        value = words[..., word::step] >> shift
        if (left := WORD - shift) < bits:
            value = value & ((1 << left) - 1) | words[..., word + 1 :: step] << left
        values[..., i::period] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return values[..., :count].movedim(-1, axis)


def words_for(count: int, bits: int) -> int:
    """Words that hold ``count`` values back to back."""
    return -(-count * bits // WORD)
