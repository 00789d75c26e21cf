"""What ways to store a layer's weights cost: bytes, and milliseconds a token, measured on the target or modelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from llmopt.calibration.budget import Option
from llmopt.ir.module import Module
from llmopt.ir.rewrite import arguments, is_weight
from llmopt.ir.sites import EMBEDDING, EMBEDDING_Q, EXPERTS, LINEAR, Site
from llmopt.ir.weights import Weight
from llmopt.target import TargetInfo


@dataclass(frozen=True)
class Clock:
    """Milliseconds of weights a token: what the target measured of a linear of one row, else the bytes a token reads
    over ``bandwidth``, in bytes a second (None: no time is asked for, and all are 0)."""

    target: TargetInfo
    bandwidth: float | None

    def option(self, label: str, weights: Sequence[Weight], site: Site, packed: Packed | None, loss: float) -> Option:
        """A way to store a call's weights: as codes, or as they are."""
        ms, measured = self.ms(site.node, weights, packed)
        return Option(label, stored_bytes(weights, packed), loss, ms, measured)

    def ms(self, node: fx.Node, weights: Sequence[Weight], packed: Packed | None = None) -> tuple[float, bool]:
        """Milliseconds of a call, and whether they were measured."""
        if self.bandwidth is None:
            return 0.0, False
        if node.target == LINEAR:
            n, k = weights[0].shape
            bits, group = (None, k) if packed is None else (packed.bits, packed.group)
            us = self.target.linear_us(n, k, str(weights[0].dtype).removeprefix("torch."), bits, group)
            if us is not None:
                return us / 1e3, True
        return 1e3 * stored_bytes(weights, packed) * share_read(node) / self.bandwidth, False

    def rest(self, module: Module, function: fx.GraphModule, chosen: set[str]) -> float:
        """Milliseconds of all weights but the chosen ones and tables of which a token reads one row."""
        if self.bandwidth is None:
            return 0.0
        total, done = 0.0, chosen | embedded(function)
        for node in function.graph.find_nodes(op="call_function", target=LINEAR):
            name = str(arguments(node)[1].target)
            if name not in done and name in module.weights:
                done.add(name)
                total += self.ms(node, [module.weights[name]])[0]
        return total + 1e3 * sum(w.nbytes for name, w in module.weights.items() if name not in done) / self.bandwidth


@dataclass(frozen=True)
class Packed:
    """Integer codes of ``bits``, one scale (and unless ``symmetric`` one zero point) a ``group`` of columns."""

    bits: int
    group: int
    symmetric: bool
    scale_dtype: torch.dtype

    def nbytes(self, weight: Weight) -> float:
        """Bytes of a weight's codes, scales and zero points."""
        overhead = 8 * self.scale_dtype.itemsize + (0 if self.symmetric else 8)
        return torch.Size(weight.shape).numel() * (self.bits + overhead / self.group) / 8


def stored_bytes(weights: Sequence[Weight], packed: Packed | None) -> float:
    """Bytes of weights as codes, or as they are."""
    return sum(w.nbytes if packed is None else packed.nbytes(w) for w in weights)


def share_read(node: fx.Node) -> float:
    """The share of a call's weights that one token reads: of experts, those it is routed to."""
    if node.target != EXPERTS:
        return 1.0
    given = arguments(node)
    return float(given[1].meta["val"].shape[-1]) / float(given[3].meta["val"].shape[0])


def embedded(function: fx.GraphModule) -> set[str]:
    """Tables that are only looked up: a token reads one row of them."""
    calls = [n for op in (EMBEDDING, EMBEDDING_Q) for n in function.graph.find_nodes(op="call_function", target=op)]
    tables = {table for node in calls for table in node.args if isinstance(table, fx.Node) and is_weight(table)}
    return {str(table.target) for table in tables if len(table.users) == 1}
