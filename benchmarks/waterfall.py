"""The bandwidth waterfall of docs/benchmarks.md: where a decode step's time goes, each part beside its floor.

Rows in rows/waterfall/: ``step_us`` of the step's graphs; ``parts`` with launches a step, microseconds, bytes and FLOPs
a launch; ``how`` the parts were timed; ``gb_s`` and ``tflops`` that this GPU reaches.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.serve_rows import read as read_rows
from llmopt.report.svg import COLOURS, text

Row = dict[str, Any]
PLAIN = "bfloat16"
WIDTH, LABELS, FIGURES, BAR, TOP = 760, 210, 150, 22, 24
REST = "between kernels, drawing"


def floor_us(part: Row, row: Row) -> float:
    """Microseconds of all launches of a part at the GPU's bandwidth or arithmetic, whichever is longer."""
    reads = part["bytes"] / row["gb_s"] / 1e3
    return float(part["launches"] * max(reads, part["flops"] / row["tflops"] / 1e6))


def parts_of(row: Row) -> list[tuple[str, float, float]]:
    """(name, microseconds, floor) a step of each part, then what the parts leave unexplained."""
    found = [(p["part"], float(p["launches"] * p["us"]), floor_us(p, row)) for p in row["parts"]]
    return [*found, (REST, row["step_us"] - sum(us for _, us, _ in found), 0.0)]


def plot(row: Row) -> str:
    """SVG: parts from left to right as they add up to the step, dark where the floor is."""
    parts = parts_of(row)
    scale = (WIDTH - LABELS - FIGURES) / row["step_us"]
    height = TOP + BAR * len(parts) + 8
    drawn = [f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    what = f"{row['model']}, {row['recipe']}, batch {row['batch']}, prompt {row['prompt_len']}"
    title = f"{what}: {row['step_us'] / 1e3:.2f} ms a step"
    drawn.append(text(LABELS, TOP - 8, title, "start"))
    before = 0.0
    for i, (name, us, least) in enumerate(parts):
        y = TOP + i * BAR
        drawn.append(text(LABELS - 8, y + 15, name, "end"))
        for length, colour in ((us, "#a8c7fa"), (min(us, least), COLOURS[0])):
            x, width = LABELS + before * scale, max(length, 0) * scale
            drawn.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{BAR - 6}" fill="{colour}"/>')
        share = f", {least / us:.0%} floor" if least else ""
        drawn.append(text(LABELS + (before + us) * scale + 5, y + 15, f"{us / 1e3:.2f} ms{share}", "start"))
        before += us
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" role="img">{"".join(drawn)}</svg>\n'
    )


def name_of(row: Row) -> str:
    """File of a row's plot, in docs/."""
    recipe = "" if row["recipe"] == PLAIN else "-" + "-".join(re.findall(r"\w+", row["recipe"].removeprefix(PLAIN)))
    return f"waterfall-{row['model']}{recipe}-bs{row['batch']}.svg"


def read(folder: Path) -> list[Row]:
    """The last row of each plot, in the order they first appear."""
    return list({name_of(row): row for row in read_rows(folder, "*.jsonl")}.values())


def waterfall_section(rows: list[Row]) -> str:
    """Markdown with every plot; empty without rows."""
    if not rows:
        return ""
    parts = ["## Where a decode step's time goes\n"]
    parts.append(
        "Dark: the floor, bytes at the bandwidth or FLOPs at the rate that GPU reaches, whichever takes longer.\n"
    )
    for row in rows:
        floor = sum(least for _, _, least in parts_of(row))
        parts.append(
            f"![{row['model']}, {row['recipe']}, at batch {row['batch']}]({name_of(row)})\n\n"
            f"{row['machine']}, {row['gb_s'] / 1e3} TB/s, "
            f"{row['tflops']:g} TFLOP/s: floor {floor / 1e3:.2f} of {row['step_us'] / 1e3:.2f} ms. Parts timed by "
            f"{row['how']}; commit {row['commit']}, {row['date']}.\n"
        )
    return "\n".join(parts)
