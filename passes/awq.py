"""Scale weights up where activations are large before they are rounded, and clip their ranges (AWQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from llmopt.calibration.experts import Experts, each_expert
from llmopt.calibration.rounding import best_limits, candidates, output_error, share_of_largest
from llmopt.calibration.session import Group, Statistics, require_calibration, walk_groups
from llmopt.calibration.spool import SavedSet, Spooled
from llmopt.ir.folding import Folding, find_folding, swap
from llmopt.ir.module import Module
from llmopt.ir.ops.activation import ACTIVATIONS
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.quant import Scheme
from llmopt.ir.rewrite import arguments
from llmopt.ir.sites import EXPERTS, Choice, precision_of, routers
from llmopt.ir.weights import Clipped, Scaled, Stack, Weight

GATE_UP, DOWN = 3, 4  # arguments of llmopt.moe_experts, their biases two further on


@dataclass(frozen=True)
class Awq(Pass):
    """Matches linears and experts that read one input. Replaces their weights with weights scaled a channel, what makes
    the input (a norm, the ungated half of a gated product, attention's values) with the inverse, exactly; then, with
    ``clip``, clips each group of columns. After Lin et al., "AWQ" (2024).

    Scales favour channels of large activations and small weights, by the exponent whose rounding gives the least error
    of the layers' outputs on calibration text. List quantize_weights or gptq with the same ``bits``, ``group_size`` and
    ``symmetric`` after it: this pass rounds nothing. What set_precision or choose_precision said before counts for
    them all. ``clip``: search each group's limit as well, which changes numerics. ``include``, ``exclude``,
    ``experts``: as quantize_weights; calls of one input are scaled together or not at all, but for a router, which
    follows exactly. Each expert has limits, and scales between its two matrices where the gate is a plain product, by
    the rows routed to it (few rows: see Experts).
    """

    name: ClassVar[str] = "awq"
    calibrates: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fuse_qkv", "fuse_gate_up", "set_precision")

    bits: int = 4
    group_size: Literal[32, 64, 128] | None = 128
    symmetric: bool = True
    clip: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    experts: bool = False

    @property
    def changes_numerics(self) -> bool:
        """Scaling is exact, clipping is not."""
        return self.clip

    def requires(self, module: Module, ctx: PassContext) -> None:
        """There is calibration text and one function without states."""
        require_calibration(self, module, ctx)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a group of calls."""
        where = f"pass {self.name}"
        (function,) = self.served(module)
        choice = Choice(where, self.include, self.exclude, experts=self.experts)
        sites = [site for _, site in choice.sites(module, [function])]
        schemes = {name: self._scheme(module, name, ctx) for site in sites for name in site.weights}
        if ctx.calibration is None:
            return 0
        exempt, count = routers(function), 0
        for group in walk_groups(self, module, function, sites, ctx.calibration):
            chosen = [schemes[name] for site in group.sites for name in site.weights]
            folding = find_folding(group.input)
            if folding is not None and not {site.node for site in group.sites} >= {*folding.readers} - exempt:
                folding = None
            work = self._experts if group.sites[0].node.target == EXPERTS else self._linears
            count += work(module, function, group, chosen, folding)
        return count

    def _scheme(self, module: Module, name: str, ctx: PassContext) -> Scheme:
        bits, block = precision_of(module, name, self.bits, self.group_size, f"pass {self.name}")
        return Scheme("int", bits, 1, block, self.symmetric, ctx.dtype)

    def _linears(
        self,
        module: Module,
        function: fx.GraphModule,
        group: Group,
        schemes: list[Scheme],
        folding: Folding | None,
    ) -> bool:
        """Scale and clip linears of one input; whether anything was done."""
        statistics = Statistics(group)

        def scale() -> dict[str, Tensor]:
            assert folding is not None
            weights = [group.values_of(argument(module, site.node, 1)) for site in group.sites]
            share = torch.stack([share_of_largest(w, s) * len(w) for w, s in zip(weights, schemes)]).sum(0)
            tried = candidates(statistics.magnitude, share / sum(map(len, weights)), folding.tie)
            pairs = list(zip(weights, schemes))
            errors = [sum(output_error(statistics.gram, w, s, t) for w, s in pairs) for t in tried]
            return {"scale": tried[errors.index(min(errors))]}

        def limits(node: fx.Node, scheme: Scheme) -> dict[str, Tensor]:
            return {"limits": best_limits(statistics.gram, group.values_of(argument(module, node, 1)), scheme)}

        if folding is not None:
            found = group.saved("scale", scale).tensors()["scale"]
            fold(module, function, group, folding, found)
            statistics.divide(found)
        for index, (site, scheme) in enumerate(zip(group.sites, schemes if self.clip else ())):
            saved = group.saved(f"limits{index}", partial(limits, site.node, scheme))
            swap(module, function, site.node, 1, partial(Clipped, limits=Spooled(saved.path, "limits")))
        return folding is not None or self.clip

    def _experts(
        self,
        module: Module,
        function: fx.GraphModule,
        group: Group,
        schemes: list[Scheme],
        folding: Folding | None,
    ) -> bool:
        """Scale and clip the experts of one call, one at a time; whether anything was done."""
        node, inside = group.sites[0].node, arguments(group.sites[0].node)[7] in ACTIVATIONS
        if folding is not None:
            saved = group.saved("scale", lambda: {"scale": shared_scale(module, group, schemes[0], folding)})
            fold(module, function, group, folding, saved.tensors()["scale"])
        if not inside and not self.clip:
            return folding is not None
        experts, (first, second) = Experts(module, group), (argument(module, node, slot) for slot in (GATE_UP, DOWN))

        def compute(e: int) -> dict[str, Tensor]:
            found, gate_up, down = {}, group.expert(first, e), group.expert(second, e)
            if self.clip:
                found["limits0"] = best_limits(experts.inputs(e)[0].gram, gate_up, schemes[0])
                gate_up = Clipped.of(gate_up, found["limits0"])
            hidden = experts.hidden(e, gate_up)
            if inside:
                tried = candidates(hidden.magnitude, share_of_largest(down, schemes[1]))
                found["inner"] = min(tried, key=lambda t: output_error(hidden.gram, down, schemes[1], t))
                hidden, down = hidden.divided(found["inner"]), down * found["inner"]
            if self.clip:
                found["limits1"] = best_limits(hidden.gram, down, schemes[1])
            return found

        done = each_expert(experts.count, compute, group)
        if self.clip:
            swap(module, function, node, GATE_UP, partial(Clipped, limits=stacked(done, "limits0")))
        if inside:
            inner = torch.stack([saved.tensors()["inner"] for saved in done])
            scale_inside(module, function, node, inner)
        if self.clip:
            swap(module, function, node, DOWN, partial(Clipped, limits=stacked(done, "limits1")))
        return True


def fold(module: Module, function: fx.GraphModule, group: Group, folding: Folding, scale: Tensor) -> None:
    """Divide the group's input by ``scale`` (K,), in the graph and in the activations at hand."""
    folding.apply(module, function, 1 / scale)
    for value in folding.values:
        group.walk.rescale(value, 1 / scale)


def shared_scale(module: Module, group: Group, scheme: Scheme, folding: Folding) -> Tensor:
    """The scale (C,) of the input of experts with the least error over all of them, each on its own rows."""
    experts, weight = Experts(module, group), argument(module, group.sites[0].node, GATE_UP)
    shares = [share_of_largest(group.expert(weight, e), scheme) for e in range(experts.count)]
    tried = candidates(experts.everyone.magnitude, torch.stack(shares).mean(0), folding.tie)
    errors = torch.zeros(len(tried), dtype=torch.float64)
    for e in range(experts.count):
        gram, values = experts.inputs(e)[0].gram, group.expert(weight, e)
        errors += torch.tensor([output_error(gram, values, scheme, t) for t in tried], dtype=torch.float64)
    return tried[int(errors.argmin())]


def scale_inside(module: Module, function: fx.GraphModule, node: fx.Node, inner: Tensor) -> None:
    """Multiply the columns of the second matrices by ``inner`` (E, I), divide the ungated rows of the first ones."""
    rows = torch.cat((torch.ones_like(inner), 1 / inner), 1)
    swap(module, function, node, GATE_UP, partial(Scaled, axis=1, factor=rows))
    swap(module, function, node, DOWN, partial(Scaled, axis=2, factor=inner))
    if arguments(node)[GATE_UP + 2] is not None:
        swap(module, function, node, GATE_UP + 2, partial(Scaled, axis=1, factor=rows))


def argument(module: Module, node: fx.Node, slot: int) -> Weight:
    """A call's weight as it is now."""
    name = node.args[slot]
    assert isinstance(name, fx.Node)
    return module.weights[str(name.target)]


def stacked(done: Sequence[SavedSet], name: str) -> Stack:
    """Saved tensors as one weight, an expert a slice."""
    return Stack(tuple(Spooled(saved.path, name) for saved in done))


PASS = Awq
