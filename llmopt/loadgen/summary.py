"""What a run measured: rates, percentiles, goodput under an SLO, and what the client cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.errors import ConfigError
from llmopt.loadgen.client import Record
from llmopt.loadgen.drive import Run

PERCENTILES = (50, 90, 95, 99)
LATE_MS, BUSY = 5.0, 0.8
"""A client whose loop is later than this at p99, or busier, is part of what it measures."""


@dataclass(frozen=True)
class Slo:
    """Bounds in milliseconds a request must meet to count as good; None: no bound. ``itl``: p99 of its own gaps."""

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @staticmethod
    def parse(texts: Iterable[str]) -> Slo:
        """From ``ttft=250`` and the like; raises ConfigError for another name or no number."""
        bounds: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition("=")
            try:
                bounds[name] = float(value)
            except ValueError as error:
                raise ConfigError(f"{text!r} is no bound", where="--slo", hint="write ttft=250") from error
        if unknown := set(bounds) - set(Slo.__dataclass_fields__):
            names = ", ".join(Slo.__dataclass_fields__)
            raise ConfigError(f"unknown bound {sorted(unknown)[0]!r}", where="--slo", hint=f"one of {names}")
        return Slo(**bounds)

    def met(self, record: Record) -> bool:
        """Whether a request succeeded within every bound; a bound on what was not measured is not met."""
        found = {"ttft": record.ttft, "tpot": record.tpot, "e2e": record.e2e}
        found["itl"] = float(np.percentile(record.gaps, 99)) if record.gaps else None
        if record.output_tokens == 1:  # nothing comes after the first token
            found["tpot"] = found["itl"] = 0.0
        bounds = {name: bound for name, bound in vars(self).items() if bound is not None}
        return record.error is None and all(
            (value := found[name]) is not None and value * 1e3 <= bound for name, bound in bounds.items()
        )


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, p50, p90, p95, p99 and the largest, in milliseconds; None for no values."""
    if not seconds:
        return None
    ms = np.asarray(seconds) * 1e3
    cuts = {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(ms, PERCENTILES))}
    return {k: round(v, 3) for k, v in {"mean": float(ms.mean()), **cuts, "max": float(ms.max())}.items()}


def summarize(run: Run, slo: Slo) -> dict[str, Any]:
    """One flat document a run: counts, tokens a second over the whole run, latencies of the requests that succeeded."""
    good = [r for r in run.records if r.error is None]
    tokens = sum(r.output_tokens for r in good)
    chunks = sum(len(r.chunks) for r in good)
    errors = Counter(r.error for r in run.records if r.error is not None)
    met = sum(slo.met(r) for r in run.records)
    return {
        "requests": len(run.records),
        "succeeded": len(good),
        "failed": len(run.records) - len(good),
        "errors": dict(errors.most_common(10)),
        "seconds": round(run.seconds, 3),
        "requests_s": round(len(good) / run.seconds, 3),
        "prompt_tokens": sum(r.prompt_tokens for r in good),
        "output_tokens": tokens,
        "output_tok_s": round(tokens / run.seconds, 1),
        "total_tok_s": round((tokens + sum(r.prompt_tokens for r in good)) / run.seconds, 1),
        "tokens_per_chunk": round(tokens / chunks, 3) if chunks else None,
        "ttft_ms": percentiles([r.ttft for r in good if r.ttft is not None]),
        "tpot_ms": percentiles([r.tpot for r in good if r.tpot is not None]),
        "itl_ms": percentiles([gap for r in good for gap in r.gaps]),
        "e2e_ms": percentiles([r.e2e for r in good]),
        "slo_ms": {name: bound for name, bound in vars(slo).items() if bound is not None},
        "goodput_s": round(met / run.seconds, 3),
        "goodput_share": round(met / len(run.records), 4),
        "peak_running": peak_running(run.records),
        "client": _client(run),
    }


def peak_running(records: Sequence[Record]) -> int:
    """Most requests open at one moment."""
    steps = sorted([(r.sent, 1) for r in records] + [(r.end, -1) for r in records])
    return int(np.cumsum([step for _, step in steps]).max()) if steps else 0


def _client(run: Run) -> dict[str, Any]:
    """The client's own lateness; ``bottleneck`` when it may have shaped the figures."""
    lag = percentiles(run.overhead.lags)
    waited = percentiles([max(0.0, r.sent - r.due) for r in run.records])
    late = lag is not None and lag["p99"] > LATE_MS
    return {
        "loop_lag_ms": lag,
        "sent_late_ms": waited,
        "cpu_share": round(run.overhead.cpu, 3),
        "bottleneck": late or run.overhead.cpu > BUSY,
    }
