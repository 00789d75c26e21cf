"""Choose bits and group size layer by layer, so that a model fits a budget with the least loss."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from llmopt.calibration.budget import Option, Point, choose, pareto
from llmopt.calibration.session import require_calibration, spool_of
from llmopt.calibration.spool import Spool
from llmopt.errors import PassError
from llmopt.ir.feed import run_sequence
from llmopt.ir.module import Module, Precision
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.quant import RoundToNearest, Scheme
from llmopt.ir.samples import Calibration
from llmopt.ir.sites import Choice, layer_name
from llmopt.ir.weights import Constant, Weight

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class ChoosePrecision(Pass):
    """Matches ``aten.linear`` over a weight. Replaces nothing: notes the bits and group size quantize_weights and gptq,
    listed after it, are to use for each weight instead of their own.

    Budgets, of which at least one is given: ``kl``, mean nats a token; ``size`` of all weights, such as 5GB;
    ``ms_per_token``, modelled as the bytes a token reads over ``bandwidth``, such as 4.39TB/s. ``kl`` alone gives the
    smallest model within it, the others the least KL. ``bits`` and ``group_sizes``: what to choose from, beside leaving
    a weight as it is. Each weight's KL is measured with it alone rounded to the fewest bits, on ``windows`` of the
    calibration text; other options are taken to lose in proportion to their squared error, and losses to add up.
    ``include``, ``exclude``: as quantize_weights.
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
        if missing := [b for b in self.bits if b not in ctx.target.quant_bits]:
            known = ", ".join(map(str, ctx.target.quant_bits)) or "none"
            what = f"target {ctx.target.name} has no {missing[0]}-bit weights"
            raise PassError(what, where=f"pass {self.name}", hint=f"it has: {known}")
        require_calibration(self, module, ctx)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One a weight that is quantized."""
        (function,) = self.served(module)
        choice = Choice(f"pass {self.name}", self.include, self.exclude)
        names = list(dict.fromkeys(n for _, site in choice.sites(module, [function]) for n in site.weights))
        candidates = {name: self._candidates(module, name) for name in names}
        if ctx.calibration is None:
            module.precision |= {name: Precision(*found[0]) for name, found in candidates.items()}
            return len(names)
        measured = f"{self.bits} {self.group_sizes} {self.symmetric} {self.windows} {names}"
        spool = spool_of(self, module, function, ctx.calibration, measured)
        losses = self._losses(module, candidates, ctx.calibration, spool)
        options = {name: self._options(module, name, candidates[name], losses[name], ctx.dtype) for name in names}
        front = pareto(list(options.values()))
        rest = sum(w.nbytes for name, w in module.weights.items() if name not in options)
        best = self._choose(front, rest, rest - embeddings(module, function))
        for name, index in zip(names, best.chosen):
            found = candidates[name]
            module.precision[name] = Precision(*found[index]) if index < len(found) else None
        module.notes[self.name] = explain(options, best, front, rest)
        return sum(module.precision[name] is not None for name in names)

    def _candidates(self, module: Module, name: str) -> list[tuple[int, int]]:
        """Bits and group sizes that fit a weight's rows, the smallest first."""
        width = module.weights[name].shape[-1]
        sizes = [size for size in self.group_sizes if width % size == 0]
        if not sizes:
            what = f"none of the group sizes {list(self.group_sizes)} divides its {width} input features"
            raise PassError(what, where=f"pass {self.name}, layer {layer_name(module, name)}", hint="exclude it")
        return [(bits, size) for bits in sorted(self.bits) for size in sorted(sizes, reverse=True)]

    def _losses(
        self, module: Module, candidates: dict[str, list[tuple[int, int]]], calibration: Calibration, spool: Spool
    ) -> dict[str, float]:
        """Mean KL of each weight alone at its smallest candidate."""
        tokens = calibration.windows[: self.windows]
        exact: list[Tensor] = []

        def measure(weight: Weight, name: str, option: tuple[int, int]) -> dict[str, Tensor]:
            if not exact:
                exact.extend(logits(module, window) for window in tokens)
            module.weights[name] = Constant(self._rounded(weight, *option).to(weight.dtype))
            losses = [kl(a, logits(module, window)) for a, window in zip(exact, tokens)]
            module.weights[name] = weight
            return {"kl": torch.tensor(losses)}

        found = {}
        for done, (name, options) in enumerate(candidates.items(), 1):
            saved = spool.saved(f"loss{done}", partial(measure, module.weights[name], name, options[0]))
            found[name] = float(saved.tensors()["kl"].mean())
            calibration.progress(self.name, done, len(candidates))
        return found

    def _rounded(self, weight: Weight, bits: int, group: int) -> Tensor:
        scheme = Scheme("int", bits, 1, group, self.symmetric)
        return RoundToNearest("", weight, scheme).tensor().dequantize()

    def _options(
        self, module: Module, name: str, candidates: list[tuple[int, int]], loss: float, dtype: torch.dtype
    ) -> list[Option]:
        """What each candidate takes and loses, and last the weight as it is."""
        weight = module.weights[name]
        exact, count = weight.tensor().float(), prod(weight.shape)
        errors = [float((self._rounded(weight, *p) - exact).pow(2).sum()) for p in candidates]
        overhead = 8 * dtype.itemsize + (0 if self.symmetric else 8)  # bits of a group's scale and zero
        made = [
            Option(
                f"{bits} bits, groups of {group}",
                count * (bits + overhead / group) / 8,
                loss * e / max(errors[0], 1e-30),
            )
            for (bits, group), e in zip(candidates, errors)
        ]
        return [*made, Option("as it is", float(weight.nbytes), 0.0)]

    def _choose(self, front: list[Point], rest: float, rest_read: float) -> Point:
        """The best point within the budgets; raises PassError naming the one that binds."""
        limits = {}
        if self.size is not None:
            limits[f"size {self.size}"] = number_of_bytes(self.size) - rest
        if self.ms_per_token is not None and self.bandwidth is not None:
            allowed = self.ms_per_token / 1e3 * number_of_bytes(self.bandwidth)
            limits[f"ms_per_token {self.ms_per_token:g}"] = allowed - rest_read
        binding = min(limits, key=limits.__getitem__, default="")
        limit, where = limits.get(binding), f"pass {self.name}"
        if limit is not None and front[0].size > limit:
            over = (front[0].size - limit) / 1e6
            what = f"the budget {binding} cannot be met: the smallest choice takes {over:.2f} MB more"
            raise PassError(what, where=where, hint="raise it, or allow fewer bits")
        found = choose(front, limit, self.kl)
        if found is None:
            least = min(point.size for point in front if point.loss <= (self.kl or 0.0))
            what = f"the budgets kl {self.kl:g} and {binding} exclude each other"
            over = (least - (limit or 0.0)) / 1e6
            raise PassError(f"{what}: that KL takes {over:.2f} MB more", where=where, hint="raise one of them")
        return found


def logits(module: Module, tokens: Tensor) -> Tensor:
    """Log-probabilities (T, V) of one window."""
    (name,) = module.functions
    return run_sequence(module, name, tokens.tolist()).double().log_softmax(-1)


def kl(reference: Tensor, found: Tensor) -> float:
    """Mean KL of log-probabilities (T, V)."""
    return float((reference.exp() * (reference - found)).sum(-1).mean())


def embeddings(module: Module, function: fx.GraphModule) -> float:
    """Bytes of tables that a token reads one row of."""
    tables = {n.args[0] for n in function.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)}
    alone = [t for t in tables if isinstance(t, fx.Node) and len(t.users) == 1]
    return float(sum(module.weights[str(t.target)].nbytes for t in alone))


def explain(options: dict[str, list[Option]], best: Point, front: list[Point], rest: float) -> dict[str, Any]:
    """The choice and its reasons, for report.json: every option of each weight, and the front."""
    layers = [
        {
            "name": name,
            "chosen": found[index].label,
            "options": [{"label": o.label, "bytes": round(o.size), "kl": float(f"{o.loss:.4g}")} for o in found],
        }
        for (name, found), index in zip(options.items(), best.chosen)
    ]
    return {
        "bytes": round(best.size + rest),
        "kl": float(f"{best.loss:.4g}"),
        "layers": layers,
        "front": [{"bytes": round(p.size + rest), "kl": float(f"{p.loss:.4g}")} for p in front],
    }


def number_of_bytes(text: str) -> float:
    """``5GB``, ``4.4GiB``, ``4.39TB/s`` as bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b(?:/s)?\s*", text.lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no size; write 5GB or 4.39TB/s")
    return float(found[1]) * UNITS[found[2]]


PASS = ChoosePrecision
