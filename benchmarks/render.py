"""Generates docs/benchmarks.md from benchmarks/rows/*.jsonl; ``--check`` fails when the page is out of date."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS, PAGE, INTRO = ROOT / "benchmarks" / "rows", ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "intro.md"

Row = dict[str, Any]
COLUMNS = {
    "recipe": "recipe",
    "target": "target",
    "prompt_len": "prompt",
    "batch": "batch",
    "ttft_ms": "TTFT ms",
    "ms": "ms/step",
    "ms_p20": "p20",
    "ms_p80": "p80",
    "tok_s": "tok/s",
    "gb_s": "GB/s",
    "floor_percent": "% of floor",
    "peak_mb": "peak MB",
    "commit": "commit",
    "date": "date",
}


def read_rows(folder: Path) -> list[Row]:
    """Every row of every file. Raises ValueError naming file and line for one that lacks a column."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            row = json.loads(line)
            row["peak_mb"] = round(row.get("peak_bytes", 0) / 1e6)
            if missing := {*COLUMNS, "machine", "cores", "model"} - set(row):
                raise ValueError(f"{path.name}:{number} lacks {', '.join(sorted(missing))}")
            rows.append(row)
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each (machine, model, recipe, target, prompt, batch): later lines are later measurements."""
    keys = ("machine", "cores", "model", "recipe", "target", "prompt_len", "batch")
    return list({tuple(row[k] for k in keys): row for row in rows}.values())


def render(rows: list[Row], intro: str) -> str:
    """The page: one table a machine and model, rows sorted by recipe, prompt and batch."""
    tables: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row["machine"], row["cores"], row["model"]), []).append(row)
    parts = [intro.strip()]
    for (machine, cores, model), group in sorted(tables.items()):
        bandwidth = max((row.get("bandwidth_gb_s") or 0 for row in group), default=0)
        reads = f", reads {bandwidth} GB/s" if bandwidth else ""
        group.sort(key=lambda r: (r["recipe"], r["target"], r["prompt_len"], r["batch"]))
        parts.append(f"## {model} on {machine}, {cores} cores{reads}\n\n{table(group)}")
    return "\n\n".join(parts) + "\n"


def table(rows: list[Row]) -> str:
    """A Markdown table of COLUMNS."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join("–" if row[k] is None else str(row[k]) for k in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Write the page, or with ``--check`` compare it; 1 when it differs."""
    page = render(latest(read_rows(ROWS)), INTRO.read_text("utf-8"))
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text("utf-8") == page:
            return 0
        print("docs/benchmarks.md is not what benchmarks/render.py makes of the rows: run make docs", file=sys.stderr)
        return 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
