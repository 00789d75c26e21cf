"""What each expert of a call sees on calibration text: the rows routed to it, and what fills up those with too few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.calibration.moments import Moments, measure
from llmopt.calibration.session import Group, require_finite
from llmopt.calibration.spool import SavedSet
from llmopt.ir.module import Module
from llmopt.ir.ops.moe import gate
from llmopt.ir.rewrite import arguments

LEAST = 2
"""Tokens in all, as a multiple of the columns, below which a Gram matrix is not believed."""

ENOUGH = 4
"""Tokens, as a multiple of the columns, that an average over all tokens is taken of inside an expert."""

Rule = Literal["own rows", "mostly all tokens", "all tokens", "rounded to nearest"]
"""What an expert was fitted to, see Experts: it saw as many rows as columns; fewer; none; too few tokens in all."""


class Experts:
    """The inputs of each expert of a ``llmopt.moe_experts`` call, read window by window, one expert at a time.

    A Gram matrix of fewer rows than columns says nothing of most directions, and an expert may see no row at all. Each
    expert's own rows are therefore joined by as many rows as it has columns, each like the average over all tokens as
    if they were routed to it: for its second matrix, through its own first one. With more rows of its own they count
    less and less. On classics-moe-12m's experts of layers 0 and 4 (256 columns, int4 g128), GPTQ's output error on
    held-out text, relative to that of rounding to nearest, was, with own rows alone and with the others: 0.94 and 0.73
    at 512 tokens, 0.73 and 0.55 at 1024, 0.49 and 0.47 at 8192; at 256 it was 1.03 and 1.05. Below LEAST tokens a
    column in all, moments are those of unrelated channels, which makes any fit rounding to nearest.
    """

    def __init__(self, module: Module, group: Group) -> None:
        self.module, self.group = module, group
        given = arguments(group.sites[0].node)
        self.index, self.activation = given[1], str(given[7])
        self.biases = [None if bias is None else module.weights[str(bias.target)] for bias in given[5:7]]
        self.count, _, self.width = module.weights[group.sites[0].weights[0]].shape
        self.inner = module.weights[group.sites[0].weights[1]].shape[-1]

    @cached_property
    def everyone(self) -> Moments:
        """Of all tokens."""
        return self._measure(self.group.rows(), self.width)

    def rows(self, expert: int) -> Iterator[Tensor]:
        """The rows (n, C) routed to an expert, window by window."""
        for rows, index in zip(self.group.rows(), self.group.walk.values(self.index)):
            yield rows[(index == expert).any(-1)]

    def inputs(self, expert: int) -> tuple[Moments, int]:
        """Moments that an expert's first matrix is fitted to, and how many rows were its own."""
        own = self._measure(self.rows(expert), self.width)
        return joined(own, self.everyone), own.rows

    def hidden(self, expert: int, gate_up: Tensor) -> Moments:
        """Moments that its second matrix is fitted to when the first is ``gate_up`` (2I, C) fp32."""
        bias = self.biases[0]
        added = None if bias is None else self.group.expert(bias, expert)
        where = f"{self.group.layer}, expert {expert}"

        def through(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
            for rows in pieces:
                yield require_finite(gate(F.linear(rows, gate_up, added), self.activation), where)

        everyone = self._measure(through(until(ENOUGH * self.inner, self.group.rows())), self.inner)
        return joined(self._measure(through(self.rows(expert)), self.inner), everyone)

    def _measure(self, pieces: Iterable[Tensor], width: int) -> Moments:
        return measure(pieces, width, self.group.walk.device)

    def rule(self, rows: int) -> Rule:
        """What an expert with so many rows of its own was fitted to, the wider of its matrices at least."""
        widest = max(self.width, self.inner)
        if self.tokens < LEAST * widest:
            return "rounded to nearest"
        return "own rows" if rows >= widest else "mostly all tokens" if rows else "all tokens"

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.group.walk.windows.numel()

    def note(self, rows: list[int]) -> dict[str, Any]:
        """For report.json: each expert's own rows, and the rule of those that did not go by them."""
        rules = {str(e): self.rule(count) for e, count in enumerate(rows) if self.rule(count) != "own rows"}
        return {"layer": self.group.layer, "rows": rows, "rules": rules}


def joined(own: Moments, everyone: Moments) -> Moments:
    """An expert's moments with a row a column of all tokens', or those of unrelated channels: see Experts."""
    columns = len(own.gram)
    if everyone.rows < LEAST * columns:
        return replace(everyone, gram=torch.eye(columns, device=own.gram.device))
    return own.plus(everyone, columns)


def until(count: int, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The first pieces that together have ``count`` rows, or all."""
    for piece in pieces:
        yield piece
        count -= len(piece)
        if count <= 0:
            return


def each_expert(count: int, compute: Callable[[int], dict[str, Tensor]], group: Group) -> list[SavedSet]:
    """What ``compute`` gives for each expert, saved one by one."""
    return [group.saved(f"expert{e}", lambda e=e: compute(e)) for e in range(count)]  # type: ignore[misc]
