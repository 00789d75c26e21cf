"""The accuracy of a build as one self-contained HTML page: figures, loss and KL by position, layers, worst tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmopt.report.choice_page import choice_section
from llmopt.report.svg import bars, lines
from llmopt.report.tables import table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } code { background: #f2f2f2; padding: 0 .2rem }
svg { max-width: 100%; height: auto } .note { color: #666 }
"""


def accuracy_page(
    result: dict[str, Any],
    title: str,
    tokenizer: Tokenizer | None = None,
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """HTML of what ``summarize`` or ``prove`` found; token ids become text where there is a tokenizer.

    ``notes``: those of the passes; the choice of precision is shown too.
    """
    base = result["baseline"]
    parts = [f"<h1>{escape(title)}: accuracy against its baseline</h1>", figures(result)]
    starts = [p["start"] for p in base["positions"]]
    parts += [
        "<h2>KL divergence by position</h2>",
        lines(starts, {"KL": [p["kl"] for p in base["positions"]]}, "token position", "nats"),
        "<h2>Loss by position</h2>",
        lines(
            starts,
            {"this": [p["nll"] for p in base["positions"]], "baseline": [p["baseline_nll"] for p in base["positions"]]},
            "token position",
            "nats a token",
        ),
    ]
    if layers := result.get("layers"):
        parts += layer_plots(layers)
    if "choose_precision" in notes:
        parts += choice_section(notes["choose_precision"])
    parts += ["<h2>Tokens that changed most</h2>", worst_table(base["worst"], tokenizer)]
    head = f'<meta charset="utf-8"><title>{escape(title)}: accuracy</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def figures(result: dict[str, Any]) -> str:
    """The main figures with their intervals."""
    base = result["baseline"]
    change, spans = base["change"], base["intervals"]
    rows = [
        ("perplexity", f"{result['perplexity']:.4f}", ""),
        ("baseline perplexity", f"{base['perplexity']:.4f}", ""),
        ("change", f"{change['value']:+.3%}", f"{change['low']:+.3%} to {change['high']:+.3%}"),
        ("mean KL, nats", f"{base['kl_mean']:.3e}", "{:.3e} to {:.3e}".format(*spans["kl_mean"])),
        ("99th percentile of KL", f"{base['kl_p99']:.3e}", "{:.3e} to {:.3e}".format(*spans["kl_p99"])),
        ("same first choice", f"{base['top1_agreement']:.2%}", "{:.2%} to {:.2%}".format(*spans["top1_agreement"])),
    ]
    scope = f"{result['scored_tokens']} tokens in {result['windows']} windows. Intervals: 95%, by block bootstrap."
    return table(("", "", "95% interval"), rows) + f'<p class="note">{scope}</p>'


def layer_plots(layers: Sequence[dict[str, Any]]) -> list[str]:
    """Output error of each quantized layer, and the KL of quantizing it alone when that was measured."""
    names = [layer["name"].removesuffix(".weight") for layer in layers]
    parts = ["<h2>Output error by layer</h2>", bars(names, [layer["output_error"] for layer in layers], "relative")]
    if "kl" in layers[0]:
        parts += [
            "<h2>KL when only this layer is quantized</h2>",
            bars(names, [layer["kl"] for layer in layers], "nats"),
        ]
    return parts


def worst_table(worst: Sequence[dict[str, Any]], tokenizer: Tokenizer | None) -> str:
    """The tokens of largest KL in their context."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(map(str, ids))

    rows = [
        (f"{w['window']}:{w['position']}", text(w["context"]), text([w["token"]]), f"{w['kl']:.3f}",
         f"{w['baseline_nll']:.2f}", f"{w['nll']:.2f}")
        for w in worst
    ]  # fmt: skip
    return table(("window:position", "context", "next", "KL", "baseline loss", "loss"), rows)
