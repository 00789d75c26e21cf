"""Move the outliers of activations into weights, so that both round to int8 (SmoothQuant)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from llmopt.calibration.session import Group, Statistics, require_calibration, walk_groups
from llmopt.ir.folding import Folding, find_folding
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.sites import Choice, routers

CHUNK = 64 << 20
"""Bytes of a weight looked at at a time."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Matches linears and experts that read one input. Replaces their weights with weights scaled a channel, what makes
    the input (a norm, the ungated half of a gated product, attention's values) with the inverse, exactly. After Xiao
    et al., "SmoothQuant" (2023).

    A channel's scale is max|x|^alpha / max|w|^(1 - alpha), max|x| taken on calibration text. List quantize_weights and
    quantize_activations after it. ``include``, ``exclude``, ``experts``: as quantize_weights; calls of one input are
    smoothed together or not at all, but for a router, which follows exactly. What passes between an expert's two
    matrices is never rounded, so nothing is smoothed there.
    """

    name: ClassVar[str] = "smoothquant"
    calibrates: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fuse_qkv", "fuse_gate_up")

    alpha: float = 0.5
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    experts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is between 0 and 1, not {self.alpha}")

    def requires(self, module: Module, ctx: PassContext) -> None:
        """There is calibration text and one function without states."""
        require_calibration(self, module, ctx)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a group of calls."""
        (function,) = self.served(module)
        choice = Choice(f"pass {self.name}", self.include, self.exclude, experts=self.experts)
        sites = [site for _, site in choice.sites(module, [function])]
        if ctx.calibration is None:
            return 0
        exempt, count = routers(function), 0
        for group in walk_groups(self, module, function, sites, ctx.calibration):
            folding = find_folding(group.input)
            if folding is None or not {site.node for site in group.sites} >= {*folding.readers} - exempt:
                continue
            saved = group.saved("scale", partial(self._scale, module, group, folding)).tensors()["scale"]
            folding.apply(module, function, 1 / saved)
            for value in folding.values:
                group.walk.rescale(value, 1 / saved)
            count += 1
        return count

    def _scale(self, module: Module, group: Group, folding: Folding) -> dict[str, Tensor]:
        weights = [module.weights[site.weights[0]] for site in group.sites]
        columns = [chunk.float().abs().flatten(0, -2).amax(0) for w in weights for chunk in w.chunks(CHUNK)]
        largest = torch.stack(columns).amax(0).clamp(min=1e-5)
        scale = Statistics(group).largest.cpu().clamp(min=1e-5).pow(self.alpha) / largest.pow(1 - self.alpha)
        return {"scale": folding.tie(scale)}


PASS = SmoothQuant
