"""Perplexity of an executor over consecutive windows of text, and its distance from a baseline on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.errors import ConfigError, RequestError
from llmopt.report.accuracy import (
    Doubles,
    block_bootstrap,
    kl_divergence,
    mean,
    p99,
    paired_bootstrap,
    perplexity,
    token_nll,
)
from llmopt.report.drive import Driver
from llmopt.runtime.protocol import Executor, FloatArray, IntArray

Progress = Callable[[str, int, int], None]
CHUNK = 256  # rows whose logits are in memory at once: 134 MB for a vocabulary of 128k
POSITIONS = 32
WORST = 20
CONTEXT = 12


@dataclass
class Scores:
    """Per-token results: one (window,) array of nats a window; empty lists of the baseline when there is none.

    ``windows``: the (window + 1,) ids each was scored on.
    """

    nll: list[Doubles] = field(default_factory=list)
    baseline_nll: list[Doubles] = field(default_factory=list)
    kl: list[Doubles] = field(default_factory=list)
    agree: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    windows: list[IntArray] = field(default_factory=list)

    def add(self, window: IntArray, chunks: Iterable[Sequence[FloatArray]]) -> None:
        """Score a window (length + 1,) from chunks of logits, each the scored model's and maybe the baseline's."""
        nll: list[list[Doubles]] = [[], []]
        kl: list[Doubles] = []
        agree: list[npt.NDArray[np.bool_]] = []
        done = 0
        for rows in chunks:
            targets = window[done + 1 : done + 1 + len(rows[0])]
            done += len(rows[0])
            for kept, logits in zip(nll, rows):
                kept.append(token_nll(logits, targets))
            if len(rows) > 1:
                kl.append(kl_divergence(rows[1], rows[0]))
                agree.append(rows[0].argmax(axis=1) == rows[1].argmax(axis=1))
        self.windows.append(window)
        self.nll.append(np.concatenate(nll[0]))
        if nll[1]:
            self.baseline_nll.append(np.concatenate(nll[1]))
            self.kl.append(np.concatenate(kl))
            self.agree.append(np.concatenate(agree))


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
        scores.add(window, zip(*(_logits(driver, window[:-1], size) for driver in drivers), strict=True))
        progress("windows", index + 1, len(windows))
    return scores


def summarize(scores: Scores) -> dict[str, Any]:
    """Perplexity; with a baseline also its perplexity, the change, KL and top-1 agreement with their 95% intervals,
    both losses and KL by position, and the tokens with the largest KL."""
    nll = np.stack(scores.nll)
    result: dict[str, Any] = {"windows": len(nll), "scored_tokens": nll.size, "perplexity": perplexity(nll)}
    if scores.baseline_nll:
        reference, kl, agree = np.stack(scores.baseline_nll), np.stack(scores.kl), np.stack(scores.agree)
        intervals = {
            "kl_mean": block_bootstrap(kl, mean),
            "kl_p99": block_bootstrap(kl, p99),
            "top1_agreement": block_bootstrap(agree, mean),
        }
        result["baseline"] = {
            "perplexity": perplexity(reference),
            "change": paired_bootstrap(nll, reference).to_json(),
            **{name: interval.value for name, interval in intervals.items()},
            "intervals": {name: [interval.low, interval.high] for name, interval in intervals.items()},
            "positions": by_position(nll, reference, kl),
            "worst": worst_tokens(scores),
        }
    return result


def by_position(nll: Doubles, reference: Doubles, kl: Doubles) -> list[dict[str, float]]:
    """Mean losses and KL of at most POSITIONS runs of neighbouring positions; ``start`` is a run's first one."""
    edges = np.unique(np.linspace(0, nll.shape[1], POSITIONS + 1).astype(int))
    return [
        {
            "start": int(low),
            "nll": float(nll[:, low:high].mean()),
            "baseline_nll": float(reference[:, low:high].mean()),
            "kl": float(kl[:, low:high].mean()),
        }
        for low, high in pairwise(edges)
    ]


def worst_tokens(scores: Scores) -> list[dict[str, Any]]:
    """The WORST positions of largest KL: where, the CONTEXT ids before, the id that followed, and both losses."""
    kl = np.stack(scores.kl)
    found = []
    for flat in np.argsort(-kl, axis=None, kind="stable")[:WORST]:
        window, position = divmod(int(flat), kl.shape[1])
        ids = scores.windows[window]
        found.append(
            {
                "window": window,
                "position": position,
                "context": ids[max(0, position + 1 - CONTEXT) : position + 1].tolist(),
                "token": int(ids[position + 1]),
                "kl": float(kl[window, position]),
                "nll": float(scores.nll[window][position]),
                "baseline_nll": float(scores.baseline_nll[window][position]),
            }
        )
    return found


def _logits(driver: Driver, window: IntArray, size: int) -> Iterator[FloatArray]:
    for output in driver.prefill(0, window, logits="all", max_chunk=size):
        yield output.logits[0]
    driver.release([0])
