"""The choice of precision on the HTML page: the front, what was taken, and why, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from llmopt.report.svg import lines
from llmopt.report.tables import table


def choice_section(notes: Mapping[str, Any]) -> list[str]:
    """HTML of what choose_precision noted."""
    front, timed = notes["front"], bool(notes["bandwidth"])
    budgets = ", ".join(escape(name) for name in notes["budgets"]) or "KL alone"
    taken = f"{notes['bytes'] / 1e6:.2f} MB, KL {notes['kl']:.3g}" + (
        f", {notes['ms']:.3g} ms a token" if timed else ""
    )
    rows = [(layer["name"], layer["chosen"], option_time(layer), layer["why"]) for layer in notes["layers"]]
    return [
        "<h2>Choice of precision</h2>",
        f"<p>Budgets: {budgets}. Chosen: {taken}; sizes as packed, losses taken to add up.</p>",
        lines([p["bytes"] / 1e6 for p in front], {"front": [p["kl"] for p in front]}, "MB of weights", "KL, nats"),
        table(("layer", "chosen", "time a token", "why not another"), rows),
    ]


def option_time(layer: Mapping[str, Any]) -> str:
    """Milliseconds of the option taken and where they come from, when any were asked for."""
    taken = next(option for option in layer["options"] if option["label"] == layer["chosen"])
    return f"{taken['ms']:.3g} ms, {taken['time']}" if "ms" in taken else ""
