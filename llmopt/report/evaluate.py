"""Perplexity of an executor over consecutive windows of text, and its distance from a baseline on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.errors import ConfigError, RequestError
from llmopt.report.accuracy import Doubles, kl_divergence, paired_bootstrap, perplexity, token_nll
from llmopt.report.drive import Driver
from llmopt.runtime.protocol import Executor, FloatArray, IntArray

Progress = Callable[[str, int, int], None]
CHUNK = 256  # rows whose logits are in memory at once: 134 MB for a vocabulary of 128k


@dataclass
class Scores:
    """Per-token results: one (window,) array of nats a window; empty lists of the baseline when there is none."""

    nll: list[Doubles] = field(default_factory=list)
    baseline_nll: list[Doubles] = field(default_factory=list)
    kl: list[Doubles] = field(default_factory=list)
    agree: list[npt.NDArray[np.bool_]] = field(default_factory=list)


def split_windows(ids: IntArray, window: int, tokens: int | None = None) -> IntArray:
    """Consecutive windows (n, window + 1) of the first ``tokens`` ids; a rest shorter than a window is dropped.

    A window is fed its first ``window`` ids and scored on its last ``window``: neighbours share one id, so every token
    of the text but the first is scored once. Raises RequestError when there is not one whole window.
    """
    count = (min(len(ids) - 1, len(ids) if tokens is None else tokens)) // window
    if count < 1:
        raise RequestError(f"the text has {len(ids)} tokens, one window needs {window} and the one after")
    return np.lib.stride_tricks.sliding_window_view(ids, window + 1)[: count * window : window]


def score(
    executor: Executor, windows: IntArray, baseline: Executor | None = None, progress: Progress = lambda *_: None
) -> Scores:
    """Run every window (n, window + 1) through ``executor`` (and ``baseline``) from an empty state; score next tokens.

    Raises ConfigError when the two have different vocabularies.
    """
    executors = [executor] if baseline is None else [executor, baseline]
    if len({e.limits.vocab_size for e in executors}) > 1:
        sizes = " and ".join(str(e.limits.vocab_size) for e in executors)
        raise ConfigError(f"the artifact and its baseline have vocabularies of {sizes} tokens")
    drivers = [Driver(e, windows.shape[1] - 1) for e in executors]
    size = min(CHUNK, *(driver.max_chunk for driver in drivers))
    scores = Scores()
    for index, window in enumerate(windows):
        _score_window(drivers, window, size, scores)
        progress("windows", index + 1, len(windows))
    return scores


def summarize(scores: Scores) -> dict[str, Any]:
    """Perplexity; with a baseline also its perplexity, the change with its 95% interval, KL and top-1 agreement."""
    nll = np.stack(scores.nll)
    result: dict[str, Any] = {"windows": len(nll), "scored_tokens": nll.size, "perplexity": perplexity(nll)}
    if scores.baseline_nll:
        reference, kl = np.stack(scores.baseline_nll), np.concatenate(scores.kl)
        change = paired_bootstrap(nll, reference)
        result["baseline"] = {
            "perplexity": perplexity(reference),
            "change": {"value": change.value, "low": change.low, "high": change.high},
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "top1_agreement": float(np.concatenate(scores.agree).mean()),
        }
    return result


def _score_window(drivers: list[Driver], window: IntArray, size: int, scores: Scores) -> None:
    streams = [_logits(driver, window[:-1], size) for driver in drivers]
    nll: list[list[Doubles]] = [[] for _ in drivers]
    done = 0
    for rows in zip(*streams, strict=True):
        targets = window[done + 1 : done + 1 + len(rows[0])]
        done += len(rows[0])
        for kept, logits in zip(nll, rows):
            kept.append(token_nll(logits, targets))
        if len(rows) > 1:
            scores.kl.append(kl_divergence(rows[1], rows[0]))
            scores.agree.append(rows[0].argmax(axis=1) == rows[1].argmax(axis=1))
    scores.nll.append(np.concatenate(nll[0]))
    if len(nll) > 1:
        scores.baseline_nll.append(np.concatenate(nll[1]))


def _logits(driver: Driver, window: IntArray, size: int) -> Iterator[FloatArray]:
    for output in driver.prefill(0, window, logits="all", max_chunk=size):
        yield output.logits[0]
    driver.release([0])
