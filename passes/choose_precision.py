"""Choose bits and group size layer by layer, so that a model fits a budget with the least loss."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmopt.calibration.budget import Limit, Option, Point, ms_of, pareto, size_of, solve, unmet
from llmopt.calibration.cost import Clock, Packed
from llmopt.calibration.explain import explain
from llmopt.calibration.session import require_calibration, spool_of
from llmopt.calibration.spool import Spool
from llmopt.errors import PassError
from llmopt.ir.dequantized import Dequantized
from llmopt.ir.feed import run_sequences
from llmopt.ir.module import Module, Precision
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.quant import ELEMENTS, QuantTensor, RoundToNearest, Scheme
from llmopt.ir.samples import Calibration
from llmopt.ir.sites import Choice, Site, layer_name, require_quantized
from llmopt.ir.weights import Constant, Weight

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class ChoosePrecision(Pass):
    """Matches ``aten.linear`` and ``llmopt.moe_experts`` over weights. Replaces nothing: notes the bits and group size
    quantize_weights and gptq, listed after it, are to use for each weight instead of their own.

    Budgets, of which at least one is given: ``kl``, mean nats a token; ``size`` of all weights, such as 5GB;
    ``ms_per_token``, of weights at one row, from kernel times of the target where it has measured that shape and
    format, else modelled as the bytes a token reads over ``bandwidth``, such as 4.39TB/s; the report says which. With
    ``kl`` it is the smallest model within all budgets, else the one of least KL. ``bits`` and ``group_sizes``: what to
    choose from, beside leaving a weight as it is. Each weight's KL is measured with it alone rounded to the fewest
    bits, on ``windows`` of the calibration text; other options are taken to lose in proportion to their squared error,
    and losses to add up. ``include``, ``exclude``, ``experts``: as quantize_weights; one call's experts share a choice.
    """

    name: ClassVar[str] = "choose_precision"
    calibrates: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("fuse_qkv", "fuse_gate_up", "smoothquant")

    kl: float | None = None
    size: str | None = None
    ms_per_token: float | None = None
    bandwidth: str | None = None
    bits: tuple[int, ...] = (3, 4, 5, 6, 8)
    group_sizes: tuple[Literal[32, 64, 128], ...] = (32, 128)
    symmetric: bool = True
    windows: int = 4
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    experts: bool = False

    def __post_init__(self) -> None:
        if self.kl is None and self.size is None and self.ms_per_token is None:
            raise ValueError("give at least one budget: kl, size or ms_per_token")
        if (self.ms_per_token is None) != (self.bandwidth is None):
            raise ValueError("ms_per_token and bandwidth go together")
        if not self.bits or not self.group_sizes or self.windows < 1:
            raise ValueError("bits, group_sizes and windows must not be empty")
        for text in (self.size, self.bandwidth):
            if text is not None:
                number_of_bytes(text)

    def requires(self, module: Module, ctx: PassContext) -> None:
        """The target runs all of these widths; there is calibration text and one function without states."""
        require_quantized(ctx.target, self.bits, self.experts, f"pass {self.name}")
        require_calibration(self, module, ctx)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One a weight that is quantized."""
        (function,) = self.served(module)
        choice = Choice(f"pass {self.name}", self.include, self.exclude, experts=self.experts)
        sites = {site.weights: site for _, site in choice.sites(module, [function])}
        candidates = {names: self._candidates(module, names) for names in sites}
        if ctx.calibration is None:
            module.precision |= {n: Precision(*found[0]) for names, found in candidates.items() for n in names}
            return sum(map(len, sites))
        measured = f"{self.bits} {self.group_sizes} {self.symmetric} {self.windows} {list(sites)}"
        spool = spool_of(self, module, function, ctx.calibration, measured)
        losses = self._losses(module, candidates, ctx.calibration, spool)
        clock = Clock(ctx.target, None if self.bandwidth is None else number_of_bytes(self.bandwidth))
        options = [self._options(module, site, candidates[n], losses[n], clock, ctx.dtype) for n, site in sites.items()]
        chosen = {name for names in sites for name in names}
        size = sum(w.nbytes for name, w in module.weights.items() if name not in chosen)
        rest = Point((), size, 0.0, clock.rest(module, function, chosen))
        limits = self._limits(rest)
        best = self._best(options, limits)
        for (names, found), index in zip(candidates.items(), best.chosen):
            precision = Precision(*found[index]) if index < len(found) else None
            module.precision |= dict.fromkeys(names, precision)
        layers = [", ".join(names) for names in sites]
        module.notes[self.name] = explain(dict(zip(layers, options)), best, limits, rest, self.bandwidth)
        return sum(module.precision[name] is not None for name in chosen)

    def _candidates(self, module: Module, names: tuple[str, ...]) -> list[tuple[int, int]]:
        """Bits and group sizes that fit the rows of a call's weights, the smallest first."""
        widths = [module.weights[name].shape[-1] for name in names]
        sizes = [size for size in self.group_sizes if not any(width % size for width in widths)]
        if not sizes:
            what = f"none of the group sizes {list(self.group_sizes)} divides its {widths[0]} input features"
            where = f"pass {self.name}, layer {layer_name(module, names[0])}"
            raise PassError(what, where=where, hint="exclude it")
        return [(bits, size) for bits in sorted(self.bits) for size in sorted(sizes, reverse=True)]

    def _losses(
        self,
        module: Module,
        candidates: dict[tuple[str, ...], list[tuple[int, int]]],
        calibration: Calibration,
        spool: Spool,
    ) -> dict[tuple[str, ...], float]:
        """Mean KL of each call's weights alone at their smallest candidate."""
        tokens = calibration.windows[: self.windows]
        exact: list[Tensor] = []

        def measure(names: tuple[str, ...], option: tuple[int, int]) -> dict[str, Tensor]:
            if not exact:
                exact.extend(logits(module, tokens, calibration.device))
            kept = {name: module.weights[name] for name in names}
            for name, weight in kept.items():
                module.weights[name] = Constant(self._rounded(weight, *option).dequantize().to(weight.dtype))
            losses = [kl(a, b) for a, b in zip(exact, logits(module, tokens, calibration.device))]
            module.weights |= kept
            return {"kl": torch.tensor(losses)}

        found = {}
        for done, (names, options) in enumerate(candidates.items(), 1):
            saved = spool.saved(f"loss{done}", partial(measure, names, options[0]))
            found[names] = float(saved.tensors()["kl"].mean())
            calibration.progress(self.name, done, len(candidates))
        return found

    def _rounded(self, weight: Weight, bits: int, group: int) -> QuantTensor:
        return RoundToNearest("", weight, Scheme("int", bits, 1, group, self.symmetric)).tensor()

    def _options(
        self,
        module: Module,
        site: Site,
        candidates: list[tuple[int, int]],
        loss: float,
        clock: Clock,
        dtype: torch.dtype,
    ) -> list[Option]:
        """What each candidate takes and loses, and last the weights as they are."""
        weights = [module.weights[name] for name in site.weights]
        errors = [sum(squared_error(w, self._rounded(w, *c)) for w in weights) for c in candidates]
        made = [
            clock.option(
                f"{bits} bits, groups of {group}",
                weights,
                site,
                Packed(bits, group, self.symmetric, dtype),
                loss * error / max(errors[0], 1e-30),
            )
            for (bits, group), error in zip(candidates, errors)
        ]
        return [*made, clock.option("as it is", weights, site, None, 0.0)]

    def _limits(self, rest: Point) -> list[Limit]:
        """The budgets of size and time, less what the other weights take."""
        limits = []
        if self.size is not None:
            limits.append(Limit(f"size {self.size}", size_of, "bytes", number_of_bytes(self.size) - rest.size))
        if self.ms_per_token is not None:
            limits.append(Limit(f"ms_per_token {self.ms_per_token:g}", ms_of, "ms", self.ms_per_token - rest.ms))
        return limits

    def _best(self, options: list[list[Option]], limits: list[Limit]) -> Point:
        """The best choice within the budgets; raises PassError naming the one that binds."""
        where, hint = f"pass {self.name}", "raise it, or allow fewer bits"
        if (missed := unmet(options, limits)) is not None:
            limit, over = missed
            what = f"the budget {limit.name} cannot be met: the smallest choice takes {amount(over, limit.unit)} more"
            raise PassError(what, where=where, hint=hint)
        if (found := solve(options, limits, self.kl)) is not None:
            return found
        names = " and ".join(limit.name for limit in limits)
        if solve(options, limits, None) is None:
            raise PassError(f"the budgets {names} exclude each other", where=where, hint="raise one of them")
        least = min(p.loss for limit in limits for p in pareto(options, limit.cost) if limit.cost(p) <= limit.most)
        what = f"the budgets kl {self.kl:g} and {names} exclude each other: within the latter the KL is {least:.3g}"
        raise PassError(what, where=where, hint="raise one of them")


def squared_error(weight: Weight, made: QuantTensor) -> float:
    """Sum of squared differences of a weight and its rounded form, some rows at a time."""
    total, rounded = 0.0, Dequantized("", made)
    step = max(1, ELEMENTS * weight.rows // prod(weight.shape))
    for start in range(0, weight.rows, step):
        bounds = start, min(start + step, weight.rows)
        total += float((rounded.read(*bounds) - weight.read(*bounds).float()).pow(2).sum(dtype=torch.float64))
    return total


def amount(value: float, unit: str) -> str:
    """A budget's excess in words."""
    return f"{value / 1e6:.2f} MB" if unit == "bytes" else f"{value:.4g} ms"


def logits(module: Module, tokens: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Log-probabilities (T, V) of each of some windows (m, T), which run side by side."""
    (name,) = module.functions
    for found in run_sequences(module, name, tokens.tolist(), device=device):
        yield found.double().log_softmax(-1)


def kl(reference: Tensor, found: Tensor) -> float:
    """Mean KL of log-probabilities (T, V)."""
    return float((reference.exp() * (reference - found)).sum(-1).mean())


def number_of_bytes(text: str) -> float:
    """``5GB``, ``4.4GiB``, ``4.39TB/s`` as bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b(?:/s)?\s*", text.lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no size; write 5GB or 4.39TB/s")
    return float(found[1]) * UNITS[found[2]]


PASS = ChoosePrecision
