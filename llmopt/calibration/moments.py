"""First and second moments of a layer's inputs, gathered row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.ir.samples import CPU


@dataclass(frozen=True)
class Moments:
    """Sums over ``rows`` inputs x of K channels: ``gram`` of x xᵀ (K, K), ``sums`` of |x| and the ``largest`` |x| (K,).

    All fp32. Of no rows at all they are zeros.
    """

    gram: Tensor
    sums: Tensor
    largest: Tensor
    rows: int

    @property
    def magnitude(self) -> Tensor:
        """Mean |x| of each channel, (K,)."""
        return self.sums / max(self.rows, 1)

    def divided(self, scale: Tensor) -> Moments:
        """Those of the inputs over ``scale`` (K,)."""
        return Moments(self.gram / torch.outer(scale, scale), self.sums / scale, self.largest / scale, self.rows)

    def plus(self, others: Moments, rows: int) -> Moments:
        """With ``rows`` more, each like the average of ``others``."""
        share = rows / others.rows
        gram, sums = self.gram + share * others.gram, self.sums + share * others.sums
        return Moments(gram, sums, torch.maximum(self.largest, others.largest), self.rows + rows)


def measure(pieces: Iterable[Tensor], width: int, device: torch.device = CPU) -> Moments:
    """Moments of inputs that come in pieces (T, K) of ``width`` K, fp32, all on ``device``."""
    gram, rows = torch.zeros(width, width, device=device), 0
    sums, largest = torch.zeros(2, width, device=device)
    for x in pieces:
        if not len(x):
            continue
        magnitude = x.abs()
        gram.addmm_(x.T, x)
        sums, largest = sums + magnitude.sum(0), torch.maximum(largest, magnitude.amax(0))
        rows += len(x)
    return Moments(gram, sums, largest, rows)
