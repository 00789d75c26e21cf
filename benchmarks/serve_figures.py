"""The serving figures of one artifact in one command: a burst, a Poisson load, shared prefixes with and without cache.

    python benchmarks/serve_figures.py ARTIFACT --device cuda --append benchmarks/rows/serve/load.jsonl
    python benchmarks/serve_figures.py build/demo --scale 0.05   # a small one through the same steps

Each load goes over HTTP to a server of its own settings; one load failing does not stop the others. The last lines
compare what was found with what was aimed at for Llama-3.1-8B in bf16 on an H200. ``--scale`` shortens lengths,
prefixes and numbers of requests alike. Random weights of a large vocabulary want ``word_tokenizer.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import constrained
from benchmarks.soak import serving
from llmopt.errors import LlmoptError
from llmopt.loadgen.benchmark import Load, append_row, measure
from llmopt.loadgen.client import Endpoint
from llmopt.loadgen.lengths import Lengths
from llmopt.loadgen.summary import Slo
from llmopt.loadgen.workload import Shape

GREEDY = {"temperature": 0.0, "ignore_eos": True}
Found = dict[str, dict[str, Any]]
GOALS: tuple[tuple[str, Callable[[Found], float], Callable[[float], bool], str], ...] = (
    ("output tok/s, all at once", lambda f: f["burst"]["output_tok_s"], lambda v: v >= 12_500, ">= 12500"),
    ("TTFT p99 ms, Poisson", lambda f: f["poisson"]["ttft_ms"]["p99"], lambda v: v <= 250, "<= 250"),
    ("ITL p99 ms, Poisson", lambda f: f["poisson"]["itl_ms"]["p99"], lambda v: v <= 25, "<= 25"),
    (
        "TTFT p50, cache off over on",
        lambda f: f["shared, cache off"]["ttft_ms"]["p50"] / f["shared"]["ttft_ms"]["p50"],
        lambda v: v >= 5,
        ">= 5",
    ),
)


def loads(scale: float, rate: float, vocab: int) -> dict[str, Load]:
    """The loads, by name. A prompt of the shared load is its prefix and 16 tokens of its own."""

    def part(number: float) -> int:
        return max(4, round(number * scale))

    spread = Lengths.parse(f"uniform:{part(100)}:{part(1024)}", "lengths")
    mixed = Shape(spread, spread, vocab_size=vocab)
    own, answer = (Lengths.parse(str(part(n)), "lengths") for n in (16, 64))
    shared = Shape(own, answer, 8, part(2000), vocab)
    count = part(512)
    return {
        "burst": Load(mixed, count, warmup=8),
        "poisson": Load(mixed, count, rate=rate, warmup=8),
        "shared": Load(shared, count, warmup=1),
        "shared, cache off": Load(shared, count, warmup=1),
    }


def run(url: str, name: str, load: Load, options: argparse.Namespace, found: Found) -> None:
    """One load on a server that is up; its summary goes into ``found`` and the file of rows."""
    load = Load(**{**vars(load), "seed": secrets.randbits(32), "label": f"llmopt {options.artifact.name}: {name}"})
    print(f"{time.strftime('%H:%M:%S')} {name}: {load.describe()}", flush=True)
    try:
        summary, _ = asyncio.run(measure(Endpoint(url, extra=GREEDY), load, Slo(ttft=250, itl=25)))
    except LlmoptError as error:
        print(f"  failed: {error}", flush=True)
        return
    found[name] = summary
    if options.append is not None:
        append_row(options.append, summary)
    shown = {key: summary[key] for key in ("ttft_ms", "itl_ms") if summary[key]}  # none without answers of two pieces
    times = ", ".join(f"{key} {value['p50']:.1f} / {value['p99']:.1f}" for key, value in shown.items())
    late = "; the client was a bottleneck" if summary["client"]["bottleneck"] else ""
    print(f"  {summary['output_tok_s']:.0f} tok/s, {times}, {summary['failed']} failed{late}", flush=True)


def compare(found: Found) -> list[str]:
    """A line for each goal: what was found, what was aimed at, and whether it is met."""
    lines = []
    for what, value, met, goal in GOALS:
        try:
            figure = value(found)
        except (KeyError, TypeError, ZeroDivisionError):
            figure = math.nan
        lines.append(f"{'met' if met(figure) else 'MISSED':7}{what}: {figure:.1f} ({goal})")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code 1 when a load has no figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--weights", type=Path, help="directory of the weights, when kept outside")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--rate", type=float, default=16.0, help="requests a second of the Poisson load")
    parser.add_argument("--vocab-size", type=int, default=1000, help="prompt token ids are below this")
    parser.add_argument("--scale", type=float, default=1.0, help="of lengths and of numbers of requests")
    parser.add_argument("--append", type=Path, help="append the rows to this JSONL file")
    parser.add_argument("--append-constrained", type=Path, help="append the constrained rows to this one")
    options = parser.parse_args(arguments)
    weights = [] if options.weights is None else ["--weights", str(options.weights)]
    told = ["--device", options.device, *weights]
    flags = [*told, "--max-sequences", str(options.max_sequences), "--max-waiting", "4096", "--log", "off"]
    planned, found = loads(options.scale, options.rate, options.vocab_size), Found()
    for cache in ("--prefix-cache", "--no-prefix-cache"):
        with serving(options.artifact, *flags, cache) as (_, url):
            for name, load in planned.items():
                if name.endswith("off") == (cache == "--no-prefix-cache"):
                    run(url, name, load, options, found)
    batch, rounds = min(32, options.max_sequences), max(3, round(20 * options.scale))
    rows = [] if options.append_constrained is None else ["--append", str(options.append_constrained)]
    constrained.main([str(options.artifact), *told, "--batches", str(batch), "--rounds", str(rounds), *rows])
    print("\n".join(compare(found)))
    return 0 if set(found) == set(planned) else 1


if __name__ == "__main__":
    sys.exit(main())
