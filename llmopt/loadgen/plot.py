"""One HTML page of a run: figures as a table, distributions and the course of the run as SVG; nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.loadgen.client import Record
from llmopt.loadgen.drive import Run

Points = list[tuple[float, float]]
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 520, 240, 58, 24, 40, 14
POINTS = 400
"""Points a curve is drawn with at most."""
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 74rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .9rem .2rem 0; text-align: right }
th:first-child, td:first-child { text-align: left }
figure { display: inline-block; margin: 1rem 1rem 0 0; max-width: 100% }
svg { max-width: 100%; height: auto }
text { fill: currentColor; font-size: 12px }
.grid { stroke: currentColor; opacity: .18 } .curve { fill: none; stroke: #2f7ed8; stroke-width: 2 }
pre { overflow-x: auto }
"""


def page(summary: dict[str, Any], run: Run) -> str:
    """The whole page."""
    title = f"{summary['model']} at {summary['url']}"
    about = "; ".join(filter(None, (summary["label"], summary["load"], summary["date"])))
    good = [r for r in run.records if r.error is None]
    figures = [
        chart("Time to first token", "ms", "share of requests", cdf([r.ttft for r in good if r.ttft is not None])),
        chart("Inter-token latency", "ms", "share of gaps", cdf([gap for r in good for gap in r.gaps])),
        chart("End to end", "ms", "share of requests", cdf([r.e2e for r in good])),
        chart("Output tokens", "s", "tokens a second", throughput(good, run.seconds)),
        chart("Requests open", "s", "requests", running(run.records)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n{latency_table(summary)}\n{''.join(figures)}\n"
        f"<details><summary>All figures</summary><pre>{escape(json.dumps(summary, indent=2))}</pre></details>"
        "</body></html>\n"
    )


def latency_table(summary: dict[str, Any]) -> str:
    """Latencies, a row each."""
    rows = [(name, summary[f"{name.lower()}_ms"]) for name in ("TTFT", "TPOT", "ITL", "E2E")]
    heads = ("mean", "p50", "p90", "p95", "p99", "max")
    body = "".join(
        f"<tr><td>{name} ms</td>" + "".join(f"<td>{found[head] if found else '-'}</td>" for head in heads) + "</tr>"
        for name, found in rows
    )
    return f"<table><tr><th></th>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{body}</table>"


def cdf(seconds: Sequence[float]) -> Points:
    """(milliseconds, share of values at most that)."""
    if not seconds:
        return []
    shares = np.linspace(0, 1, min(POINTS, len(seconds) + 1))
    values = np.quantile(np.asarray(seconds) * 1e3, shares)
    return [(float(v), float(s)) for v, s in zip(values, shares)]


def throughput(records: Sequence[Record], seconds: float) -> Points:
    """(second, output tokens a second), each request's tokens spread over its pieces."""
    edges = np.linspace(0, seconds, min(POINTS, max(2, int(seconds) + 1)))
    total: npt.NDArray[np.float64] = np.zeros(len(edges) - 1)
    for r in records:
        if r.chunks:
            total += np.histogram(r.chunks, edges)[0] * (r.output_tokens / len(r.chunks))
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    return [(float(x), float(y)) for x, y in zip(middles, total / widths)]


def running(records: Sequence[Record]) -> Points:
    """(second, requests sent and not ended), as steps."""
    points: Points = []
    open_now = 0
    for at, step in sorted([(r.sent, 1) for r in records] + [(r.end, -1) for r in records]):
        points += [(at, open_now), (at, open_now + step)]
        open_now += step
    return points[:: max(1, len(points) // (4 * POINTS))]


def chart(title: str, x_label: str, y_label: str, points: Points) -> str:
    """A figure with one curve; says so when there is nothing to draw."""
    if not points:
        return f"<figure><figcaption>{title}: nothing measured</figcaption></figure>"
    xs, ys = ticks(0, max(x for x, _ in points)), ticks(0, max(y for _, y in points))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / xs[-1] * wide, TOP + high - y / ys[-1] * high

    parts = []
    for y in ys:
        _, at = place(0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + wide}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xs:
        at, _ = place(x, 0)
        parts.append(f'<text x="{at:.1f}" y="{TOP + high + 16}" text-anchor="middle">{x:g}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts.append(f'<polyline class="curve" points="{line}"/>')
    parts.append(f'<text x="{LEFT + wide}" y="{HEIGHT - 6}" text-anchor="end">{x_label}</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}, {y_label}</figcaption>{svg}</figure>"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to the first at or above ``high``: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    unit = 10.0 ** np.floor(np.log10(span / most))
    step = next(unit * m for m in (1, 2, 5, 10, 20) if span / (unit * m) <= most)
    count = int(np.ceil(span / step - 1e-9))
    return [float(round(low + i * step, 10)) for i in range(count + 1)]
