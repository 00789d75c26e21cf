"""Round the inputs of quantized linears to int8 or FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from llmopt.calibration.session import Statistics, require_calibration, walk_groups
from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.ops.rounding import LIMITS
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import call, dialect
from llmopt.ir.sites import EXPERTS_Q, LINEAR_Q, Site, by_input, matches, nearest, quantized_names
from llmopt.ir.weights import Constant, checkpoint_names


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Matches ``llmopt.linear_q`` and ``llmopt.moe_experts_q``. Replaces their input with ``llmopt.round_activations``
    of it, once for calls that share it. What passes between an expert's two matrices is not rounded.

    ``format``: int8 or fp8_e4m3. ``scale``: ``token``, each row by its own largest value, or ``tensor``, one scale by
    the largest value on calibration text. ``exclude``: glob patterns over the checkpoint's tensor names.
    """

    name: ClassVar[str] = "quantize_activations"
    after: ClassVar[tuple[str, ...]] = ("quantize_weights", "gptq", "smoothquant", "awq")
    lossy: ClassVar[bool] = True

    format: Literal["int8", "fp8_e4m3"] = "int8"
    scale: Literal["token", "tensor"] = "token"
    exclude: tuple[str, ...] = ()

    @property
    def needs_calibration(self) -> bool:
        """Static scales come from calibration text."""
        return self.scale == "tensor"

    def requires(self, module: Module, ctx: PassContext) -> None:
        """The target rounds activations to this format; static scales need calibration text."""
        if self.format not in ctx.target.activation_formats:
            known = ", ".join(ctx.target.activation_formats) or "none"
            what = f"target {ctx.target.name} does not round activations to {self.format}"
            raise PassError(what, where=f"pass {self.name}", hint=f"it has: {known}")
        if self.needs_calibration:
            require_calibration(self, module, ctx)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite an input."""
        count = 0
        for function in self.served(module):
            sites = self._sites(module, function)
            if self.scale == "token" or ctx.calibration is None:
                for group in by_input(sites):
                    round_input(module, function, group, torch.ones(1) if self.scale == "tensor" else None, self.format)
            else:
                for found in walk_groups(self, module, function, sites, ctx.calibration):
                    statistics = Statistics(found)
                    largest = found.saved("largest", lambda s=statistics: {"largest": s.largest.max()[None]})  # type: ignore[misc]
                    scale = largest.tensors()["largest"] / LIMITS[self.format]
                    round_input(module, function, found.sites, scale, self.format)
            count += len(by_input(sites))
        return count

    def _sites(self, module: Module, function: fx.GraphModule) -> list[Site]:
        nodes = [n for n in function.graph.nodes if n.target in (LINEAR_Q, EXPERTS_Q)]
        stems = {node: quantized_names(node)[0] for node in nodes}
        names = {node: checkpoint_names(stem, module.weights[f"{stem}.codes"]) for node, stem in stems.items()}
        everything = sorted({name for found in names.values() for name in found})
        for pattern in self.exclude:
            if not any(matches(name, (pattern,)) for name in everything):
                hint = nearest(pattern, everything)
                raise PassError(f"pattern {pattern!r} matches no layer", where=f"pass {self.name}", hint=hint)
        return [
            Site(node, (f"{stems[node]}.codes",))
            for node in nodes
            if not any(matches(name, self.exclude) for name in names[node])
        ]


def round_input(
    module: Module, function: fx.GraphModule, group: list[Site], scale: torch.Tensor | None, format: str
) -> None:
    """Put the rounded input in the place of the input of some linears."""
    first, source = group[0].node, group[0].input
    static = None
    if scale is not None:
        static = module.weight_node(function, group[0].weights[0].replace(".codes", ".input_scale"), Constant(scale))
    with function.graph.inserting_before(first):
        rounded = call(function, module, dialect.round_activations.default, source, static, format, like=first)
    for site in group:
        site.node.update_arg(0, rounded)


PASS = QuantizeActivations
