"""What ``llmopt tune`` does for the cuda target: candidates built anywhere, timed on a GPU machine, kept in a table."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmopt.errors import ConfigError
from llmopt.program import Program

Progress = Callable[[str, int, int], None]


def build_candidates(
    program: Program, target_options: Mapping[str, Any], folder: Path, model: str, only: str, progress: Progress
) -> dict[str, Any]:
    """Write a bundle of candidates for a program's buckets; needs Triton, no GPU. Counts of what it holds.

    Raises ConfigError for a bad option and when there is nothing to time, ResourceError without Triton, TargetError for
    what does not compile.
    """
    from .options import clamp, parse_options
    from .pack import stored
    from .tuning.build import build_bundle, program_cases

    options = clamp(parse_options(target_options), program)
    arch = max(options.archs)
    cases = program_cases(stored(program), options, arch, model, only)
    if not cases:
        what = f"{only!r} matches no configuration of these shapes" if only else "no kernel has configurations to time"
        raise ConfigError(what, where="llmopt tune", hint="--only is searched in lines like 'gemm bfloat16 8x64x64'")
    bundle = build_bundle(folder, cases, arch, progress, options.jobs)
    shapes = {(entry.kernel, entry.key) for entry in bundle.entries}
    return {
        "bundle": str(folder), "arch": arch, "compiler": bundle.compiler, "shapes": len(shapes),
        "candidates": len(bundle.entries), "cubins": len(bundle.cubins),
    }  # fmt: skip


def time_candidates(
    folder: Path, device: str, output: Path | None, rows_file: Path | None, progress: Progress
) -> dict[str, Any]:
    """Time a bundle's entries on this machine's GPU and put the best of each shape into a table (None: the built-in).

    Raises ArtifactError for a damaged bundle, ConfigError for a table of another architecture, ResourceError without a
    GPU of the bundle's architecture; the table is written last and whole, or not at all.
    """
    from .tuning.bundle import open_bundle
    from .tuning.table import builtin, read, write
    from .tuning.timing import row_fields, time_bundle, winners

    bundle = open_bundle(folder)
    table = output or builtin(bundle.arch)
    if table.exists():
        read(table, bundle.arch)  # what is wrong with it should be known before the timing
    rows, failed, machine = time_bundle(bundle, device, progress)
    machine["date"] = datetime.date.today().isoformat()
    if rows_file is not None:
        with rows_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row_fields(row, machine)) + "\n" for row in rows)
    best = winners(rows)
    wrong = [f"{r.entry.kernel} {r.entry.key} {r.entry.config}: error {r.timed.error}" for r in rows if not r.right]
    held = write(table, bundle.arch, bundle.compiler, best) if best else 0
    return {
        "gpu": machine["gpu"], "table": str(table), "compiler": bundle.compiler, "timed": len(rows), "best": best,
        "entries": held, "wrong": wrong, "failed": failed,
    }  # fmt: skip
