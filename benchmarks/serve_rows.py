"""The serving section of docs/benchmarks.md: rows of ``llmopt bench serve``, of soaks, of host cost in rows/serve/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LOAD, SOAK, HOST, CONSTRAINED = "load*.jsonl", "soak*.jsonl", "host*.jsonl", "constrained*.jsonl"


def serving_section(folder: Path) -> str:
    """Markdown of every row, in the order measured; empty without rows."""
    loads, soaks = ([load_cells(r) for r in read(folder, LOAD)], [soak_cells(r) for r in read(folder, SOAK)])
    hosts = [host_cells(r) for r in read(folder, HOST)]
    parts = []
    if loads:
        parts.append("## Serving\n\nRows of `llmopt bench serve`; times are p50 / p99 in ms.\n\n" + table(loads))
    if soaks:
        parts.append("## Soaks\n\nRows of `benchmarks/soak.py`.\n\n" + table(soaks))
    if hosts:
        what = "Rows of `benchmarks/host_cost.py`: processor time of a step over an executor that does nothing."
        parts.append(f"## Host cost\n\n{what}\n\n" + table(hosts))
    if constrained := [constrained_cells(r) for r in read(folder, CONSTRAINED)]:
        what = (
            "Rows of `benchmarks/constrained.py`: a step of the same batch, free and under a JSON schema (p20 to p80); "
            "of a CPU its processor time, which both share, with a GPU the clock's."
        )
        parts.append(f"## Constrained output\n\n{what}\n\n" + table(constrained))
    return "\n".join(part + "\n" for part in parts)


def read(folder: Path, pattern: str) -> list[Row]:
    """Rows of all files of one kind."""
    lines = [line for path in sorted(folder.glob(pattern)) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def load_cells(row: Row) -> dict[str, object]:
    """One run of the load generator."""

    def times(name: str) -> str:
        found = row[name]
        return f"{found['p50']:.1f} / {found['p99']:.1f}" if found else "–"

    return {
        "server": row["label"] or row["model"],
        "load": row["load"],
        "output tok/s": row["output_tok_s"],
        "TTFT": times("ttft_ms"),
        "ITL": times("itl_ms"),
        "end to end": times("e2e_ms"),
        "failed": row["failed"],
        "client": "bottleneck" if row["client"]["bottleneck"] else f"{row['client']['cpu_share']:.0%} of a core",
        "date": row["date"],
    }


def soak_cells(row: Row) -> dict[str, object]:
    """One soak."""
    growth = ", ".join(f"{name} {value:+.1%}" for name, value in row["memory_growth"].items())
    return {
        "artifact": row["artifact"],
        "machine": f"{row['machine']}, {row['cores']} cores",
        "minutes": round(row["seconds"] / 60, 1),
        "clients": row["clients"],
        "requests": row["requests"],
        "ends": ", ".join(f"{count} {name}" for name, count in row["ends"].items()),
        "memory": growth,
        "/health p99 ms": row["health_ms_p99"],
        "load average": row.get("load_average", "–"),
        "timer late p99 ms": row["timer_late_ms_p99"],
        "problems": row["problems"],
        "commit": row["commit"],
        "date": row["date"],
    }


def host_cells(row: Row) -> dict[str, object]:
    """One closed loop over the null executor."""
    return {
        "machine": row["machine"],
        "batch": row["batch"],
        "waiting": row["waiting"],
        "callers": row["tenants"],
        "ms/step": row["cpu_ms"],
        "mean": row["cpu_ms_mean"],
        "p99": row["cpu_ms_p99"],
        "encoding for the API process": row["wire_ms"],
        "commit": row["commit"],
        "date": row["date"],
    }


def constrained_cells(row: Row) -> dict[str, object]:
    """One batch size: by processor time where the model runs on it, else by the clock."""
    by = "cpu_" if row["device"] == "cpu" else ""
    low, overhead, high = (row[f"{by}overhead{part}"] for part in ("_p20", "", "_p80"))
    return {
        "artifact": row["artifact"],
        "machine": f"{row['machine']}, {row['threads'] or row['cores']} threads, {row['device']}",
        "batch": row["batch"],
        "vocabulary": row["vocab_size"],
        "free, ms": row[f"{by}free_ms"],
        "constrained, ms": row[f"{by}constrained_ms"],
        "overhead": f"{overhead:+.1%} ({low:+.1%} to {high:+.1%})",
        "load average": row["load_average"],
        "commit": row["commit"],
        "date": row["date"],
    }


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table of rows with equal keys."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row.values()) + " |" for row in rows])
