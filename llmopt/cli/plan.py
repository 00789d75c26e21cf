"""``llmopt plan``: what a build will need and how fast it can be at best, before any build."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli.output import emit_json, emit_pairs, emit_table, human_bytes

if TYPE_CHECKING:
    from llmopt.plan import Plan

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Size(click.ParamType):  # type: ignore[type-arg]
    """``24GB``, ``24GiB``, ``4.39TB/s``: a number of bytes, or bytes a second."""

    def __init__(self, name: str, per_second: bool = False) -> None:
        self.name, self.per_second = name, per_second

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of bytes; fails on anything that is not a positive size."""
        if isinstance(value, int | float):
            return float(value)
        tail = r"(?:/s)?" if self.per_second else ""
        found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?{tail}\s*", str(value).lower())
        if found is None or found[2] not in UNITS or not float(found[1]):
            example = "4.39TB/s" if self.per_second else "24GB or 22.5GiB"
            self.fail(f"{value!r} is no size; write {example}", param, ctx)
        return float(found[1]) * UNITS[found[2]]


@click.command("plan")
@click.argument("source", metavar="CHECKPOINT_OR_CONFIG", type=click.Path(path_type=Path))
@click.option("-r", "--recipe", required=True, help="Recipe file, or the name of a built-in one (int4-cpu).")
@click.option("--memory", type=Size("size"), help="Memory to fit in, such as 24GB; default: this machine's.")
@click.option(
    "--bandwidth", type=Size("rate", True), help="Memory bandwidth, such as 4.39TB/s; default: measured here."
)
@click.option("--context", type=click.IntRange(1), help="Longest sequence; default: the recipe's, else the model's.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, in bytes and milliseconds.")
def plan(
    source: Path, recipe: str, memory: float | None, bandwidth: float | None, context: int | None, as_json: bool
) -> None:
    """Sizes before and after a recipe, KV memory, the batch × context that fits, the floor in ms a token.

    Reads shapes only: a config.json is enough. Exit codes: 3 recipe, 4 checkpoint, 5 model, 6 pass, 8 target.
    """
    from llmopt.cli.compile import require_compile_extra

    require_compile_extra()
    from llmopt.plan import plan_build
    from llmopt.recipe import load_recipe
    from llmopt.report.machine import probe_bandwidth

    loaded = load_recipe(recipe)
    measured = bandwidth is None
    memory = memory or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    found = plan_build(source, loaded, memory, bandwidth or probe_bandwidth(), context)
    if as_json:
        emit_json(found.to_json() | {"bandwidth_measured": measured})
    else:
        show(found, measured)


def show(plan: Plan, measured: bool) -> None:
    """For people."""
    fixed = f" and {human_bytes(plan.kv_fixed)} a sequence" if plan.kv_fixed else ""
    emit_pairs(
        [
            ("model", f"{plan.model}, {plan.parameters / 1e6:.1f}M parameters"),
            ("weights", f"{human_bytes(plan.checkpoint_bytes)} -> {human_bytes(plan.weight_bytes)} ({plan.recipe})"),
            ("activations", f"{human_bytes(plan.activation_bytes)} (one prefill chunk)"),
            ("KV cache", f"{human_bytes(plan.kv_per_token)} a token{fixed}"),
            ("memory", f"{human_bytes(plan.memory)} at {human_bytes(plan.bandwidth)}/s{' (measured)' * measured}"),
            ("context", longest_line(plan)),
        ]
    )
    rows = [
        (fit.context, fit.batch, human_bytes(fit.sequence_bytes), f"{plan.floor_ms[fit.context]:.2f}",
         f"{fit.floor_ms:.2f}" if fit.floor_ms else None, f"{fit.tokens_per_s:.0f}" if fit.tokens_per_s else None)
        for fit in plan.fits
    ]  # fmt: skip
    click.echo()
    emit_table(("context", "batch that fits", "KV a sequence", "floor ms, batch 1", "at that batch", "tok/s"), rows)


def longest_line(plan: Plan) -> str:
    """How long one sequence may be."""
    if plan.largest_context is None:
        return "nothing fits: the weights and activations alone take the memory"
    limited = "" if plan.largest_context == plan.max_context else f", the model's {plan.max_context} do not fit"
    return f"{plan.largest_context} tokens in one sequence{limited}"
