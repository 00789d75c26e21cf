"""Measures an artifact through the executor protocol; one flat row a batch size, ready for the row store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmopt.artifact import Artifact
from llmopt.report.build_log import build_log
from llmopt.report.drive import Driver
from llmopt.report.machine import Machine, commit, cores, peak_memory
from llmopt.report.traffic import step_bytes
from llmopt.runtime.protocol import Executor

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Shape:
    """What to measure: sequences at once, prompt and generated tokens of each, runs after the first."""

    batch: int
    prompt_len: int
    gen_len: int
    repeat: int


def measure(executor: Executor, artifact: Artifact, shape: Shape, machine: Machine, progress: Progress) -> Row:
    """Times of one batch size in milliseconds (median, 20th and 80th percentile) and what they mean on ``machine``.

    Raises ConfigError when the executor has no room for the batch.
    """
    driver = Driver(executor, shape.prompt_len + shape.gen_len)
    driver.require(shape.batch)
    first, steps = [], []
    for run in range(shape.repeat + 1):
        ttft, decode = one_run(driver, shape, seed=run)
        if run:  # the first run warms up: pages touched, buffers grown
            first += ttft
            steps += decode
        progress(f"batch {shape.batch}", run + 1, shape.repeat + 1)
    ms = _percentiles(steps)
    read = step_bytes(artifact.program, shape.batch, shape.prompt_len + shape.gen_len // 2)
    floor = read / machine.bandwidth * 1e3
    return {
        **describe(artifact, machine.name),
        "batch": shape.batch,
        "prompt_len": shape.prompt_len,
        "gen_len": shape.gen_len,
        "runs": shape.repeat,
        "ttft_ms": _percentiles(first)["median"],
        "ms": ms["median"],
        "ms_p20": ms["p20"],
        "ms_p80": ms["p80"],
        "tok_s": round(shape.batch / ms["median"] * 1e3, 1),
        "step_mb": round(read / 1e6, 2),
        "gb_s": round(read / ms["median"] / 1e6, 2),
        "bandwidth_gb_s": round(machine.bandwidth / 1e9, 1),
        "floor_ms": round(floor, 3),
        "floor_percent": round(100 * floor / ms["median"], 1),
        "peak_bytes": peak_memory(),
        "device_bytes": machine.taken(),
    }


def one_run(driver: Driver, shape: Shape, seed: int) -> tuple[list[float], list[float]]:
    """Seconds to each sequence's first token (prefilled one after the other), and of each decode step."""
    vocab = driver.executor.limits.vocab_size
    prompts = np.random.default_rng(seed).integers(0, vocab, (shape.batch, shape.prompt_len))
    first, steps = [], []
    for index, prompt in enumerate(prompts):
        start = time.perf_counter()
        for _ in driver.prefill(index, prompt, sample=True):
            pass
        first.append(time.perf_counter() - start)
    for done in range(shape.gen_len - 1):
        start = time.perf_counter()
        driver.decode(shape.batch, shape.prompt_len + done)
        steps.append(time.perf_counter() - start)
    driver.release(range(shape.batch))
    return first, steps


def describe(artifact: Artifact, machine: str) -> Row:
    """What was measured and where: model, recipe, target, versions, machine, commit, date."""
    manifest = artifact.manifest
    log = build_log(artifact.path)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine,
        "cores": cores(),
        "model": Path(log["checkpoint"]).name if log else manifest.model,
        "target": manifest.target,
        "recipe": summary(yaml.safe_load(artifact.file("recipe.yaml").read_text("utf-8"))),
        "versions": dict(manifest.versions),
    }


QUANTIZERS = {"quantize_weights": ("", 8), "gptq": ("gptq ", 4), "awq": ("awq ", 4)}
"""Passes that quantize weights: how they are called, and the bits they default to."""
ROUNDED = {"quantize_activations": ("activations", "int8"), "quantize_kv": ("kv", "fp8_e4m3")}
"""Passes that quantize what is computed: what, and the format they default to."""
SHORT = {"fp8_e4m3": "fp8", "int8": "int8"}


def summary(recipe: dict[str, Any]) -> str:
    """A recipe in a few words: compute dtype, what is quantized and how, what the target does otherwise than usual."""
    words = [recipe["dtype"]]
    for entry in recipe["passes"]:
        name, options = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
        options = options or {}
        if name in QUANTIZERS:
            method, bits = QUANTIZERS[name]
            group = f" g{options['group_size']}" if options.get("group_size") else ""
            kind = SHORT.get(options.get("format", "int"), f"int{options.get('bits', bits)}")
            words.append(f"{'head ' if options.get('lm_head') else ''}{method}{kind}{group}")
        if name in ROUNDED:
            what, kind = ROUNDED[name]
            words.append(f"{what} {SHORT[options.get('format', kind)]}")
    target = recipe.get("target_options") or {}
    if (fast := target.get("fp8_fast_accumulation", "never")) != "never":
        words.append(f"fast accumulation {fast}")
    if not target.get("native_kernels", True):
        words.append("onnxruntime's kernels")
    return ", ".join(words)


def append_rows(path: Path, rows: list[Row]) -> None:
    """Append rows to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p20, median, p80 = np.percentile(np.array(seconds) * 1e3, (20, 50, 80)).tolist()
    return {"median": round(median, 3), "p20": round(p20, 3), "p80": round(p80, 3)}
