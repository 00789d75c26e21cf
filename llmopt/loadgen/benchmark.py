"""The whole measurement: connect, warm up, draw the load, drive it, sum up; and the files a run leaves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.errors import ExecutorError
from llmopt.loadgen.arrivals import arrival_times
from llmopt.loadgen.client import Client, Endpoint
from llmopt.loadgen.drive import Progress, Run, drive
from llmopt.loadgen.plot import page
from llmopt.loadgen.summary import Slo, summarize
from llmopt.loadgen.workload import Call, FileShape, Shape


@dataclass(frozen=True)
class Load:
    """What is sent and when. ``rate`` in requests a second, infinite: all at once; ``concurrency`` None: no limit.

    ``label``: what is measured, for the row.
    """

    shape: Shape | FileShape
    requests: int
    rate: float = math.inf
    arrival: str = "poisson"
    burst: int = 16
    concurrency: int | None = None
    warmup: int = 0
    seed: int = 0
    label: str | None = None

    def describe(self) -> str:
        """One line for people."""
        shape = self.shape
        rate = "all at once" if math.isinf(self.rate) else f"{self.arrival} {self.rate:g}/s"
        limit = "" if self.concurrency is None else f", at most {self.concurrency} at once"
        if isinstance(shape, FileShape):
            return f"{self.requests} requests of {shape.path.name}, {rate}{limit}"
        lengths = f"{shape.prompt_len.text} tokens in, {shape.output_len.text} out"
        prefix = f", {shape.prefixes} shared prefixes of {shape.prefix_len}" if shape.prefixes else ""
        return f"{self.requests} requests, {lengths}{prefix}, {rate}{limit}"

    def calls(self) -> tuple[list[Call], list[Call]]:
        """(warm-up calls, measured calls), drawn from the seed; they share nothing but prefixes' lengths."""
        warm, rng = np.random.default_rng([self.seed, 1]), np.random.default_rng([self.seed, 0])
        times = arrival_times(self.arrival, rng, self.requests, self.rate, self.burst)
        measured = [Call(float(due), body) for due, body in zip(times, self.shape.bodies(rng, self.requests))]
        return [Call(0.0, body) for body in self.shape.bodies(warm, self.warmup)], measured


async def measure(
    endpoint: Endpoint, load: Load, slo: Slo, progress: Progress = lambda *_: None
) -> tuple[dict[str, Any], Run]:
    """Run a load and sum it up. Raises ResourceError without a server, ExecutorError when no request succeeded."""
    warm, calls = load.calls()
    client = Client(endpoint)
    model = await client.connect()
    if warm:
        await drive(client, warm, load.concurrency)
    run = await drive(client, calls, load.concurrency, progress)
    summary = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "label": load.label,
        "url": endpoint.url,
        "model": model,
        "endpoint": endpoint.endpoint,
        "load": load.describe(),
        "body": endpoint.extra,
        "seed": load.seed,
        **summarize(run, slo),
    }
    if not summary["succeeded"]:
        reason = next(iter(summary["errors"]))
        raise ExecutorError(f"none of {load.requests} requests succeeded: {reason}", where=endpoint.url)
    return summary, run


def write_records(path: Path, summary: dict[str, Any], run: Run) -> None:
    """Figures and one object a request; times in seconds from the start of the run."""
    path.write_text(json.dumps({**summary, "records": [vars(r) for r in run.records]}) + "\n", "utf-8")


def write_page(path: Path, summary: dict[str, Any], run: Run) -> None:
    """The page of plots."""
    path.write_text(page(summary, run), "utf-8")


def append_row(path: Path, summary: dict[str, Any]) -> None:
    """One row for a store of measurements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(summary, ensure_ascii=False) + "\n")
