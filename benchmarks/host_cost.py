"""Host time of a step: engine core, scheduler and input building over an executor that returns at once.

python benchmarks/host_cost.py --batch 64 256 --append benchmarks/rows/serve/host.jsonl

A closed loop keeps the batch full: whenever a request ends, the next one is added, so admissions, prompt chunks,
prefix matching and ends are in the numbers, as is the encoding of a step's tokens for the API process.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.program import StateGroup, StatePlan, StateSpec
from llmopt.runtime.core import EngineCore
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import ExecutorLimits, Sampled, SamplingParams, StepBatch, StepOutput
from llmopt.runtime.ragged import ragged_inputs
from llmopt.serve.wire import Tokens, encode

STATES = (StateSpec("k_0", 8, 128, "bfloat16", 0), StateSpec("v_0", 8, 128, "bfloat16", 0))
PLAN = StatePlan((StateGroup("paged", "paged", 16, STATES, shareable=True),))
CONTEXT, VOCAB = 8192, 128_256
SECONDS = 1e3


class NullExecutor:
    """Builds every step's inputs as an executor would, computes nothing, and draws the same token for everyone."""

    def __init__(self, sequences: int, steps_in_flight: int) -> None:
        self.state_plan = PLAN
        blocks = sequences * 2048 // 16
        self.limits = ExecutorLimits(
            CONTEXT, sequences, 8192, {"paged": blocks}, VOCAB, steps_in_flight=steps_in_flight
        )
        self.done: deque[StepOutput] = deque()
        self.tickets = 0

    def submit(self, batch: StepBatch) -> int:
        """Build the inputs; the device would keep the last tokens."""
        if batch.rows or batch.decode:
            ragged_inputs(batch, self.state_plan, lambda seq_id: 0)
        sampled = {row.seq_id: Sampled(7) for row in batch.rows if row.sample}
        tokens = None if batch.decode is None else np.full(len(batch.decode), 7)
        self.done.append(StepOutput(sampled, tokens=tokens))
        self.tickets += 1
        return self.tickets

    def collect(self, ticket: int) -> StepOutput:
        """The oldest step."""
        return self.done.popleft()

    def close(self) -> None:
        """Nothing to free."""


def measure(batch: int, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """Times of ``steps`` steps in a full engine, in milliseconds of processor time, and of wall time (``wall_ms``)."""
    core = EngineCore(NullExecutor(batch, args.flight), options=SchedulerOptions(prefix_cache=not args.no_prefix_cache))
    rng = np.random.default_rng(0)
    shared = rng.integers(0, VOCAB, 128)

    tenants = iter(range(1 << 60))

    def add() -> None:
        prompt = np.concatenate((shared, rng.integers(0, VOCAB, rng.integers(100, 900))))
        tenant = str(next(tenants) % args.tenants)
        greedy = SamplingParams(temperature=0)
        core.add(prompt.tolist(), GenerationParams(greedy, int(rng.integers(100, 1024)), tenant=tenant))

    for _ in range(batch + args.waiting):
        add()
    while len(core.scheduler.decoding) < batch:
        for output in core.step():
            if output.finish_reason:
                add()
    wall, cpu, wire, rows = [], [], [], []
    for _ in range(steps):
        a, b = time.perf_counter(), time.thread_time()
        outputs = core.step()
        wall.append(time.perf_counter() - a)
        cpu.append(time.thread_time() - b)
        a = time.thread_time()
        encode(Tokens(outputs))
        wire.append(time.thread_time() - a)
        rows.append(len(outputs))
        for output in outputs:
            if output.finish_reason:
                add()
    spread = statistics.quantiles(cpu, n=100)
    return {
        "batch": batch,
        "steps": steps,
        "steps_in_flight": args.flight,
        "prefix_cache": not args.no_prefix_cache,
        "waiting": args.waiting,
        "tenants": args.tenants,
        "rows_mean": round(statistics.mean(rows), 1),
        "cpu_ms_mean": round(SECONDS * statistics.mean(cpu), 4),
        "cpu_ms": round(SECONDS * statistics.median(cpu), 4),
        "cpu_ms_p99": round(SECONDS * spread[98], 4),
        "wall_ms": round(SECONDS * statistics.median(wall), 4),
        "wire_ms": round(SECONDS * statistics.median(wire), 4),
    }


def describe() -> dict[str, Any]:
    """The machine, the commit and the day."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"machine": cpu, "python": platform.python_version(), "commit": commit.stdout.strip(), "date": today}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--flight", type=int, default=2, help="steps in flight")
    parser.add_argument("--no-prefix-cache", action="store_true")
    parser.add_argument("--waiting", type=int, default=2, help="requests in the queue")
    parser.add_argument("--tenants", type=int, default=1, help="callers they come from")
    parser.add_argument("--append", type=Path, help="file of rows")
    return parser.parse_args(argv)


def main() -> None:
    """Print a row for each batch size."""
    args = arguments()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    gc.collect()
    gc.freeze()  # what was imported is not looked at again, as in the engine process
    for batch in args.batch:
        row = json.dumps({**measure(batch, args.steps, args), **describe()})
        print(row)
        if args.append:
            args.append.parent.mkdir(parents=True, exist_ok=True)
            with args.append.open("a") as file:
                file.write(row + "\n")


if __name__ == "__main__":
    main()
