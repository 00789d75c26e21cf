"""Accuracy math over logits: negative log-likelihood, KL divergence, paired block bootstrap (numpy, fp64)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Doubles: TypeAlias = npt.NDArray[np.float64]
Statistic: TypeAlias = Callable[[Array], float]

ROWS = 64  # rows turned to fp64 at a time: 64 x 256k vocabulary is 134 MB


@dataclass(frozen=True)
class Interval:
    """A point estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Value, low and high."""
        return asdict(self)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def log_softmax(logits: Array) -> Doubles:
    """Log-probabilities of logits (rows, V), in fp64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def token_nll(logits: Array, targets: Array) -> Doubles:
    """Negative log-likelihood (rows,) of ``targets`` (rows,) under logits (rows, V), in nats."""
    parts = [
        -log_softmax(logits[i : i + ROWS])[np.arange(len(targets[i : i + ROWS])), targets[i : i + ROWS]]
        for i in range(0, len(targets), ROWS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def kl_divergence(reference: Array, logits: Array) -> Doubles:
    """KL(reference ‖ logits) of each row (rows, V), in nats; rounding never makes it negative."""
    parts = []
    for i in range(0, len(logits), ROWS):
        p, q = log_softmax(reference[i : i + ROWS]), log_softmax(logits[i : i + ROWS])
        parts.append(np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0))
    return np.concatenate(parts) if parts else np.zeros(0)


def perplexity(nll: Doubles) -> float:
    """exp of the mean negative log-likelihood of all tokens."""
    return float(np.exp(nll.mean()))


def paired_bootstrap(a: Doubles, b: Doubles, draws: int = 2000, seed: int = 0) -> Interval:
    """Relative change of perplexity from ``b`` to ``a``, with a 95% interval by paired block bootstrap.

    ``a`` and ``b`` are (windows, tokens) negative log-likelihoods of the same tokens. Whole windows are drawn with
    replacement, the same ones for both: tokens of a window are correlated, and most of the spread is common to both.
    """
    difference = (a - b).mean(axis=1)
    picks = np.random.default_rng(seed).integers(0, len(difference), (draws, len(difference)))
    low, high = np.quantile(np.expm1(difference[picks].mean(axis=1)), (0.025, 0.975))
    return Interval(float(np.expm1(difference.mean())), float(low), float(high))


def block_bootstrap(values: Array, statistic: Statistic, draws: int = 500, seed: int = 0) -> Interval:
    """A statistic of values (windows, tokens), with a 95% interval by block bootstrap: whole windows are drawn."""
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile([statistic(values[pick]) for pick in picks], (0.025, 0.975))
    return Interval(statistic(values), float(low), float(high))


def mean(values: Array) -> float:
    """The mean."""
    return float(values.mean())


def p99(values: Array) -> float:
    """The 99th percentile."""
    return float(np.quantile(values, 0.99))
