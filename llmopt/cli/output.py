"""What commands print with: JSON, aligned tables, sizes, a progress bar on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from llmopt.report.units import human_bytes as human_bytes

Progress = Callable[[str, int, int], None]


def emit_json(value: Any) -> None:
    """One JSON document on stdout, keys in the order given."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def emit_table(headers: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table on stdout: first column left, the others right aligned."""
    if title:
        click.secho(title, bold=True)
    click.echo(format_table(headers, rows))


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned text; ``None`` prints as a dash."""
    cells = [list(headers), *([("-" if c is None else str(c)) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def emit_pairs(pairs: Sequence[tuple[str, object]], title: str | None = None) -> None:
    """``key  value`` lines on stdout."""
    if title:
        click.secho(title, bold=True)
    width = max((len(key) for key, _ in pairs), default=0)
    for key, value in pairs:
        click.echo(f"{key.ljust(width)}  {value}")


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Progress]:
    """Yields ``progress(what, done, total)``: a bar on stderr when it is a terminal, else nothing is drawn."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda what, done, total: None
        return
    # rich takes 60 ms to import: only those who see a bar pay for it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update


def accuracy_lines(result: dict[str, Any]) -> list[tuple[str, object]]:
    """Perplexity and, where there is a baseline, the distance from it, with 95% intervals."""
    lines: list[tuple[str, object]] = [
        ("scored", f"{result['scored_tokens']} tokens in {result['windows']} windows of {result['window']}"),
        ("perplexity", f"{result['perplexity']:.4f}"),
    ]
    if base := result.get("baseline"):
        change, spans = base["change"], base["intervals"]
        kl, agreement = spans["kl_mean"], spans["top1_agreement"]
        lines += [
            ("baseline perplexity", f"{base['perplexity']:.4f}"),
            ("change", f"{change['value']:+.3%}, 95% interval [{change['low']:+.3%}, {change['high']:+.3%}]"),
            ("KL mean", f"{base['kl_mean']:.3e} nats, 95% interval [{kl[0]:.3e}, {kl[1]:.3e}]"),
            ("KL p99", f"{base['kl_p99']:.3e} nats"),
            ("same first choice", f"{base['top1_agreement']:.2%}, [{agreement[0]:.2%}, {agreement[1]:.2%}]"),
        ]
    return lines
