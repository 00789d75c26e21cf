"""Scale weights up where activations are large before they are rounded, and clip their ranges (AWQ)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from llmopt.calibration.session import Group, Statistics, require_calibration, walk_groups
from llmopt.calibration.spool import Spooled
from llmopt.ir.folding import Folding, find_folding, swap
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.quant import Scheme, block_range, round_codes
from llmopt.ir.sites import Choice, Site, group_of
from llmopt.ir.weights import Clipped, Weight

EXPONENTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SHARES = tuple(1 - i / 80 for i in range(32))
SWEEPS = 2


@dataclass(frozen=True)
class Awq(Pass):
    """Matches linears that read one input. Replaces their weights with weights scaled a channel, what makes the input
    (a norm, the ungated half of a gated product, attention's values) with the inverse, exactly; then, with ``clip``,
    clips each group of columns. After Lin et al., "AWQ" (2024).

    Scales favour channels of large activations and small weights, by the exponent whose rounding gives the least error
    of the layers' outputs on calibration text. List quantize_weights or gptq with the same ``bits``, ``group_size`` and
    ``symmetric`` after it: this pass rounds nothing. ``clip``: search each group's limit as well, which changes
    numerics. ``include``, ``exclude``: as quantize_weights; linears of one input are scaled together or not at all.
    """

    name: ClassVar[str] = "awq"
    calibrates: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fuse_qkv", "fuse_gate_up")

    bits: int = 4
    group_size: Literal[32, 64, 128] | None = 128
    symmetric: bool = True
    clip: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    @property
    def changes_numerics(self) -> bool:
        """Scaling is exact, clipping is not."""
        return self.clip

    def requires(self, module: Module, ctx: PassContext) -> None:
        """There is calibration text and one function without states."""
        require_calibration(self, module, ctx)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a group of linears."""
        where = f"pass {self.name}"
        (function,) = self.served(module)
        sites = [site for _, site in Choice(where, self.include, self.exclude).sites(module, [function])]
        schemes = {
            name: Scheme("int", self.bits, 1, group_of(module, name, self.group_size, where), self.symmetric, ctx.dtype)
            for site in sites
            for name in site.weights
        }
        if ctx.calibration is None:
            return 0
        count = 0
        for group in walk_groups(self, module, function, sites, ctx.calibration):
            statistics, chosen = Statistics(group), [schemes[site.weights[0]] for site in group.sites]
            folding = find_folding(group.input)
            foldable = folding is not None and {site.node for site in group.sites}.issuperset(folding.readers)
            if folding is not None and foldable:
                self._scale(module, function, group, folding, chosen, statistics)
            if self.clip:
                self._clip(module, function, group, chosen, statistics)
            count += foldable or self.clip
        return count

    def _scale(
        self,
        module: Module,
        function: fx.GraphModule,
        group: Group,
        folding: Folding,
        schemes: list[Scheme],
        statistics: Statistics,
    ) -> None:
        def compute() -> dict[str, Tensor]:
            weights = [weight_of(module, site).tensor().float() for site in group.sites]
            scales = candidates(statistics.magnitude, weights, schemes, folding)
            return {"scale": min(scales, key=lambda s: output_error(statistics.gram, weights, schemes, s))}

        scale = group.saved("scale", compute).tensors()["scale"]
        folding.apply(module, function, 1 / scale)
        group.walk.rescale(group.input, 1 / scale)
        statistics.divide(scale)

    def _clip(
        self, module: Module, function: fx.GraphModule, group: Group, schemes: list[Scheme], statistics: Statistics
    ) -> None:
        def compute(site: Site, scheme: Scheme) -> dict[str, Tensor]:
            return {"limits": best_limits(statistics.gram, weight_of(module, site).tensor().float(), scheme)}

        for index, (site, scheme) in enumerate(zip(group.sites, schemes)):
            limits = Spooled(group.saved(f"limits{index}", partial(compute, site, scheme)).path, "limits")
            swap(module, function, site.node, 1, partial(Clipped, limits=limits))


def weight_of(module: Module, site: Site) -> Weight:
    """A linear's weight as it is now."""
    node = site.node.args[1]
    assert isinstance(node, fx.Node)
    return module.weights[str(node.target)]


def candidates(magnitude: Tensor, weights: list[Tensor], schemes: list[Scheme], folding: Folding) -> Iterator[Tensor]:
    """Scales (K,) to try, ones first: mean |x|^a over the weights' mean share of their group's largest^(1 - a)."""
    yield torch.ones_like(magnitude)
    shares = [w.abs() / largest(w, s).repeat_interleave(s.block_k, 1).clamp(min=1e-9) for w, s in zip(weights, schemes)]
    share = torch.cat(shares).mean(0).clamp(min=1e-4)
    for exponent in EXPONENTS:
        scale = folding.tie(magnitude.clamp(min=1e-4).pow(exponent) / share.pow(1 - exponent))
        yield scale / (scale.max() * scale.min()).sqrt()


def largest(weight: Tensor, scheme: Scheme) -> Tensor:
    """Largest |w| of each group (N, groups)."""
    return weight.reshape(len(weight), -1, scheme.block_k).abs().amax(-1)


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight (N, K) fp32 after rounding to nearest."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, 1, columns // scheme.block_k, scheme.block_k)
    scale, zero = (part[:, None, :, None] for part in block_range(blocks, scheme))
    return ((round_codes(blocks, scale, zero, scheme).float() - zero) * scale).reshape(rows, columns)


def output_error(gram: Tensor, weights: list[Tensor], schemes: list[Scheme], scale: Tensor) -> float:
    """Squared error of the outputs when the scaled weights are rounded; ``gram`` (K, K) of the unscaled inputs."""
    changes = [rounded(w * scale, scheme) / scale - w for w, scheme in zip(weights, schemes)]
    return sum(float(((change @ gram) * change).sum(dtype=torch.float64)) for change in changes)


def best_limits(gram: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """Limits (N, groups) of |weight| (N, K) that round to the least output error, ``gram`` (K, K) being the inputs'.

    Groups are chosen in turn, SWEEPS times, each beside the errors of all others: neighbours that err to opposite
    sides cancel. Never worse than no limits. On eight linears of classics-14m, with 20 shares, it saves 16 to 31% of
    the error, choosing each group by itself 10 to 22%.
    """
    size = scheme.block_k
    limits, change = largest(weight, scheme), rounded(weight, scheme) - weight
    full = limits.clone()
    for _ in range(SWEEPS):
        for index in range(full.shape[1]):
            columns = slice(index * size, (index + 1) * size)
            own, values = gram[columns, columns], weight[:, columns]
            others = change @ gram[:, columns] - change[:, columns] @ own
            best = torch.full_like(full[:, index], torch.inf)
            for share in SHARES:
                limit = full[:, index] * share
                found = rounded(values.clamp(-limit[:, None], limit[:, None]), scheme) - values
                error = ((found @ own + 2 * others) * found).sum(-1)
                better = error < best
                best = torch.where(better, error, best)
                limits[better, index], change[better, columns] = limit[better], found[better]
    return limits


PASS = Awq
