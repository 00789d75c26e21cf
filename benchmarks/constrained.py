"""What constrained output costs a step: the same batch decodes free and under a JSON schema, in turn, many times.

    python benchmarks/constrained.py build/demo --batches 1,32 --append benchmarks/rows/serve/constrained.jsonl
    python benchmarks/constrained.py ARTIFACT --device cuda --batches 32

A round is both, in one order, then in the other; the overhead is the median over rounds of the quotient of their steps,
by the clock and by the processor time of all threads (which other processes on the machine change little).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmopt.report.machine import commit, cores, processor
from llmopt.runtime.core import EngineCore
from llmopt.runtime.params import GenerationParams, Grammar
from llmopt.runtime.protocol import SamplingParams
from llmopt.serve.engine_process import EngineOptions, load_core
from llmopt.target import LoadOptions

Pair: TypeAlias = npt.NDArray[np.float64]
PROPERTIES = {"name": {"type": "string"}, "count": {"type": "integer"}, "yes": {"type": "boolean"}}
ITEM = {"type": "object", "properties": PROPERTIES, "required": list(PROPERTIES), "additionalProperties": False}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 500}
"""Longer than any run here: no sequence ends before its length."""


def steps(core: EngineCore, batch: int, count: int, grammar: Grammar | None) -> Pair:
    """Median (seconds, processor seconds) of a step in which ``batch`` sequences decode, over ``count`` steps."""
    params = GenerationParams(SamplingParams(temperature=0), count + 8, ignore_eos=True, grammar=grammar)
    ids = [core.add([5 + i % 50, 7, 9, 11], params) for i in range(batch)]
    taken = []
    while core.has_work:
        begun, busy = time.perf_counter(), time.process_time()
        outputs = core.step()
        if len(outputs) == batch:
            taken.append((time.perf_counter() - begun, time.process_time() - busy))
        if core.failures() or any(output.finish_reason == "stop" for output in outputs):
            raise SystemExit("a sequence ended before its length")
        if len(taken) == count:
            break
    for request in ids:
        core.cancel(request)
    while core.has_work:
        core.step()
    if not taken:
        raise SystemExit(f"no step held {batch} sequences: is --max-sequences of the artifact lower?")
    return np.median(taken, axis=0)


def measure(core: EngineCore, batch: int, count: int, rounds: int) -> dict[str, Any]:
    """The row of one batch size; the first round warms up."""
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    compiler = core.constraints.compiler
    assert compiler is not None
    compiler.compile(grammar)
    free, bound, quotients = [], [], []
    for turn in range(rounds + 1):
        first, second = (grammar, None) if turn % 2 else (None, grammar)
        found = {first: steps(core, batch, count, first), second: steps(core, batch, count, second)}
        if turn:
            free.append(found[None])
            bound.append(found[grammar])
            quotients.append(found[grammar] / found[None])
    spread, ms = np.quantile(quotients, [0.2, 0.5, 0.8], axis=0) - 1, 1e3 * np.median([free, bound], axis=1)
    return {
        "batch": batch,
        "vocab_size": core.limits.vocab_size,
        "rounds": rounds,
        "steps": count,
        **figures(ms[:, 0], spread[:, 0], ""),
        **figures(ms[:, 1], spread[:, 1], "cpu_"),
    }


def figures(ms: Pair, spread: Pair, prefix: str) -> dict[str, float]:
    """Fields of a row: free and constrained milliseconds, and the 20th, 50th and 80th percentile of the overhead."""
    names = ("free_ms", "constrained_ms", "overhead_p20", "overhead", "overhead_p80")
    return {prefix + name: round(float(value), 4) for name, value in zip(names, (*ms, *spread))}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--weights", type=Path, help="directory of the weights, when kept outside")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--append", type=Path, help="append a row a batch size to this JSONL file")
    options = parser.parse_args(arguments)
    batches = [int(text) for text in options.batches.split(",")]
    load = LoadOptions(device=options.device, threads=options.threads, max_sequences=max(batches))
    weights = None if options.weights is None else str(options.weights)
    core = load_core(EngineOptions(str(options.artifact), weights, load))
    row = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": commit(), "machine": processor(), "cores": cores()}
    row |= {"artifact": options.artifact.name, "device": options.device, "threads": options.threads}
    try:
        for batch in batches:
            found = row | measure(core, batch, options.steps, options.rounds)
            found["load_average"] = round(os.getloadavg()[0], 1)  # above the number of cores, others use this machine
            print(json.dumps(found), flush=True)
            if options.append is not None:
                options.append.parent.mkdir(parents=True, exist_ok=True)
                with options.append.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
    finally:
        core.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
