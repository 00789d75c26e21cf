"""Times of a cuda artifact's steps, with torch and Triton hidden: python benchmarks/cuda_steps.py ARTIFACT

For each batch x prompt: prompts prefilled, then greedy decode steps through the executor (the host one step ahead),
and the decode graphs alone by device events. Appends a row each to a JSONL file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
for hidden in ("torch", "triton"):
    sys.modules[hidden] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402

from llmopt.artifact import Artifact  # noqa: E402
from llmopt.report import bench  # noqa: E402
from llmopt.report.traffic import step_bytes  # noqa: E402
from llmopt.runtime.executors.cuda import CudaExecutor, load  # noqa: E402
from llmopt.runtime.executors.cuda.driver import call  # noqa: E402
from llmopt.runtime.protocol import Admission, DecodeRows, SamplingParams, SeqStep, StepBatch  # noqa: E402
from llmopt.runtime.state import StateAllocator  # noqa: E402
from llmopt.target import LoadOptions  # noqa: E402

GREEDY = SamplingParams(temperature=0)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, p20 and p80 in ms."""
    p20, median, p80 = np.percentile(np.array(seconds) * 1e3, (20, 50, 80)).tolist()
    return {"ms": round(median, 4), "ms_p20": round(p20, 4), "ms_p80": round(p80, 4)}


class Sequences:
    """Random prompts in an executor, one id each."""

    def __init__(self, executor: CudaExecutor) -> None:
        self.executor = executor
        self.allocator = StateAllocator(executor.state_plan, executor.limits.blocks)
        self.random = np.random.default_rng(0)
        self.lengths: dict[int, int] = {}

    def check(self) -> None:
        """Refuses a model through which nothing but zeros passes (norms of zeros): their products take less power, so
        that steps which the tensor cores bound look faster than they are."""
        prompt = np.arange(8)
        self.allocator.extend(0, len(prompt))
        row = SeqStep(0, prompt, 0, self.allocator.table(0, len(prompt)), logits="all")
        step = StepBatch((row,), admit=(Admission(0, prompt, GREEDY),))
        logits = self.executor.collect(self.executor.submit(step)).logits[0]
        self.lengths[0] = len(prompt)
        self.release()
        if not logits.std() > 0:
            raise SystemExit("all logits are alike: give random weights norms that are not zero")

    def prefill(self, seq_id: int, length: int) -> float:
        """Seconds from submit to the first token."""
        prompt = self.random.integers(0, self.executor.limits.vocab_size, length).astype(np.int64)
        admit: tuple[Admission, ...] = (Admission(seq_id, prompt, GREEDY),)
        start = time.perf_counter()
        for at in range(0, length, self.executor.limits.max_tokens_per_step):
            stop = min(length, at + self.executor.limits.max_tokens_per_step)
            if not self.allocator.extend(seq_id, stop):
                raise SystemExit("out of KV blocks")
            row = SeqStep(seq_id, prompt[at:stop], at, self.allocator.table(seq_id, stop), sample=stop == length)
            self.executor.collect(self.executor.submit(StepBatch((row,), admit=admit)))
            admit = ()
        self.lengths[seq_id] = length
        return time.perf_counter() - start

    def decode(self, steps: int) -> list[float]:
        """Seconds between the ends of steps over all sequences, the host one step ahead."""
        tickets = [self._submit()]
        ends = [time.perf_counter()]
        for number in range(steps):
            if number + 1 < steps:
                tickets.append(self._submit())
            self.executor.collect(tickets[number])
            ends.append(time.perf_counter())
        return [b - a for a, b in pairwise(ends)]

    def _submit(self) -> int:
        """A row a sequence, as arrays, which is how the scheduler says it."""
        ids, starts = (np.array([*numbers], np.int64) for numbers in (self.lengths, self.lengths.values()))
        places = np.array([self.allocator.place(seq_id) for seq_id in self.lengths], np.int64)
        for index in self.allocator.lacking(places, starts + 1):
            self.allocator.extend(int(ids[index]), int(starts[index]) + 1)
        blocks = self.allocator.gather(places, int(starts.max()) + 1)
        self.lengths = dict(zip(self.lengths, (starts + 1).tolist()))
        return self.executor.submit(StepBatch((), decode=DecodeRows(ids, starts, np.zeros_like(starts), blocks)))

    def release(self) -> None:
        """Drop every sequence."""
        self.executor.collect(self.executor.submit(StepBatch((), release=tuple(self.lengths))))
        for seq_id in self.lengths:
            self.allocator.release(seq_id)
        self.lengths.clear()


def graph_seconds(executor: CudaExecutor, batch: int, repeat: int = 20) -> list[float]:
    """Device time of the decode bucket alone, as its inputs were left."""
    backend: Any = executor.backend
    bound = backend.bound[executor.buckets.pick("decode", batch, batch)]
    events = [call("cuEventCreate", 0) for _ in range(repeat + 1)]
    call("cuEventRecord", events[0], backend.stream)
    for event in events[1:]:
        bound.forward.run()
        bound.greedy.run()
        call("cuEventRecord", event, backend.stream)
    call("cuEventSynchronize", events[-1])
    return [call("cuEventElapsedTime", a, b) / 1e3 for a, b in pairwise(events)]


def describe(artifact: Artifact, executor: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What every row says of the machine and the build."""
    build = bench.describe(artifact, executor.backend.device.name)
    return {
        **build,
        "commit": options.commit or build["commit"],
        "driver": executor.backend.device.driver,
        "cores": os.cpu_count(),
        "model": options.model or options.artifact.name,
        "triton": artifact.manifest.notes["triton"],
        "bandwidth_gb_s": options.bandwidth,
    }


def first_tokens(work: Sequences, prompt: int, times: int, rest: float) -> list[float]:
    """Seconds to the first token of one prompt, again and again, each after seconds of rest."""
    found = []
    for _ in range(times):
        time.sleep(rest)
        found.append(work.prefill(0, prompt))
        work.release()
    return found


def measure(work: Sequences, artifact: Artifact, batch: int, prompt: int, options: Any) -> dict[str, Any]:
    """One row: time to the first token of one prompt, time of a step of ``batch`` such sequences, and of its graphs."""
    times = first_tokens(work, prompt, 4, 0.0)[1:]
    rested = first_tokens(work, prompt, 3, options.rest) if batch == 1 and options.rest else []
    for seq_id in range(batch):
        work.prefill(seq_id, prompt)
    step = percentiles(work.decode(options.steps)[3:])
    graph = percentiles(graph_seconds(work.executor, batch)[2:])
    work.release()
    read = step_bytes(artifact.program, batch, prompt + options.steps // 2)
    floor = read / options.bandwidth / 1e6
    free, total = work.executor.backend.device.free_bytes()  # type: ignore[attr-defined]
    return {
        "batch": batch,
        "prompt_len": prompt,
        "gen_len": options.steps,
        "ttft_ms": percentiles(times)["ms"],
        "ttft_rested_ms": percentiles(rested)["ms"] if rested else None,
        **step,
        "graph_ms": graph["ms"],
        "tok_s": round(batch / step["ms"] * 1e3, 1),
        "step_mb": round(read / 1e6, 2),
        "gb_s": round(read / step["ms"] / 1e6, 1),
        "floor_ms": round(floor, 3),
        "floor_percent": round(100 * floor / step["ms"], 1),
        "peak_bytes": total - free,
    }


def main() -> None:
    """Measure and append rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--shapes", default="1x128,1x512,1x2048,1x8000,8x512,32x512,128x512,256x512")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rest", type=float, default=1.0, help="seconds before each rested first token; 0: none")
    parser.add_argument("--bandwidth", type=float, default=4390.0, help="GB/s a GEMV reads on this GPU")
    parser.add_argument("--commit", default="", help="of the rows; default: the checkout's")
    parser.add_argument("--model", default="", help="its name in the rows; default: the artifact's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/rows/cuda.jsonl"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    artifact = Artifact.open(options.artifact)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    start = time.perf_counter()
    executor = load(artifact, LoadOptions("cuda", max_sequences=max(batch for batch, _ in shapes)))
    load_s = round(time.perf_counter() - start, 3)
    work = Sequences(executor)
    work.check()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        for batch, prompt in shapes:
            row = {**describe(artifact, executor, options), **measure(work, artifact, batch, prompt, options)}
            row["load_s"] = load_s
            file.write(json.dumps(row) + "\n")
            keys = ("model", "batch", "prompt_len", "ttft_ms", "ttft_rested_ms", "ms", "graph_ms", "floor_percent")
            print(*(f"{key}={row[key]}" for key in (*keys, "load_s")), flush=True)
    executor.close()


if __name__ == "__main__":
    main()
