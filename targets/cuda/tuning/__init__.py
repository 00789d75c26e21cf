"""Measured kernel configurations: one table an architecture, made by benchmarks/kernels.py and kept here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

Table = Mapping[str, Mapping[str, Any]]

REACH = 2.0
"""How far, in powers of two over both extents of a weight, a measured shape lends its configuration to another."""


@cache
def load_tuning(arch: int) -> Table:
    """Configurations by kernel, then by key ("bfloat16 MxNxK" for linears); empty for an arch nobody measured."""
    path = Path(__file__).parent / f"sm_{arch}.json"
    if not path.exists():
        return {}
    table: Table = json.loads(path.read_text("utf-8"))["kernels"]
    return table


def rows_class(m: int) -> int:
    """Row counts that share tile shapes: 1, up to 64, 128, 256, 512, and more."""
    return next((bound for bound in (1, 64, 128, 256, 512) if m <= bound), 1 << 30)


def find_linear(table: Table, kernel: str, dtype: str, m: int, n: int, k: int) -> tuple[dict[str, Any], str] | None:
    """The configuration measured for a linear's shape or the nearest one within reach, and a word on which."""
    entries = table.get(kernel, {})
    if found := entries.get(f"{dtype} {m}x{n}x{k}"):
        return dict(found), "tuned"
    best: tuple[float, str] | None = None
    for key in entries:
        known, _, extents = key.partition(" ")
        if known not in ("bfloat16", "float16") or dtype not in ("bfloat16", "float16"):
            continue  # of one width: what suits one suits the other
        rows, outs, depth = map(int, extents.split("x"))
        apart = abs(math.log2(outs / n)) + abs(math.log2(depth / k))
        if rows_class(rows) == rows_class(m) and apart <= REACH:
            far = apart + 0.1 * abs(math.log2(rows / m))
            best = min(best or (far, key), (far, key))
    if best is None:
        return None
    found = {name: value for name, value in entries[best[1]].items() if name != "us"}
    return found, f"as tuned for {best[1].partition(' ')[2]}"
