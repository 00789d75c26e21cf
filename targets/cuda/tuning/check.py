"""Compares a sample of a kernel's results with float64 (numpy only)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .bundle import Entry

Read = Callable[[str, int, int], Any]
"""Elements of a buffer, by its name, byte offset and count, as float64."""

_erf = np.vectorize(math.erf)


def linear_error(entry: Entry, read: Read) -> float:
    """Largest error of some rows and columns of a linear's result, relative to its largest value; inf for NaN."""
    c: Any = entry.check
    m, n, k = c["m"], c["n"], c["k"]
    width = n if c["gate"] is None else n // 2
    random = np.random.default_rng(1)
    rows = np.unique([*random.integers(0, m, 6), 0, m - 1])
    columns = np.unique([*random.integers(0, width, 40), 0, width - 1])
    x = np.stack([read("input", 2 * k * int(r), k) for r in rows])
    found = np.stack([read("out", 2 * width * int(r), width)[columns] for r in rows])

    def product(first: int) -> Any:
        return x @ np.stack([read("weight", 2 * k * (first + int(j)), k) for j in columns]).T

    expected = product(0)
    if c["gate"] is not None:
        expected = activated(expected, c["gate"]) * product(width)
    if c["residual"]:
        expected = expected + np.stack([read("residual", 2 * width * int(r), width)[columns] for r in rows])
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return round(error, 6) if error == error else float("inf")


def activated(x: Any, kind: str) -> Any:
    """The activations of llmopt.ir.ops.activation."""
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0)


def sample_of(read: Callable[[int, int], Any], dtype: str, count: int) -> Any:
    """64 runs of at most 64 elements, spread over a result: ``read`` takes a byte offset and a count."""
    size = 4 if dtype == "float32" else 2
    run = min(64, count)
    starts = np.linspace(0, count - run, min(64, count // run)).astype(int)
    return np.concatenate([read(size * int(start), run) for start in starts])
