"""Times decode steps of the onnxruntime executor on a Llama shape: ms a step and tokens a second by batch size.

python benchmarks/ort_step.py int4-cpu --accuracy-level 0 --batch 1 8
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmopt.compiler import pass_context
from llmopt.frontend import capture, load_checkpoint
from llmopt.ir.pass_manager import PassManager
from llmopt.lower.lowering import lower
from llmopt.lower.readers import readers
from llmopt.program import Program
from llmopt.recipe import Recipe, load_recipe
from llmopt.registry import load_target
from llmopt.runtime.executors.onnxruntime import OnnxruntimeExecutor
from llmopt.runtime.protocol import Admission, SamplingParams, SeqStep, StepBatch
from llmopt.target import BuildContext, LoadOptions, TargetFiles
from targets.onnxruntime.readers import materialize
from tests.targets.onnxruntime.build import MemoryStore, loaded

SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
         "intermediate_size": 2048, "vocab_size": 32000, "max_position_embeddings": 1024}  # fmt: skip


def build(recipe: Recipe) -> tuple[Program, TargetFiles, MemoryStore]:
    """Compile the shape with random weights."""
    target = load_target(recipe.target)
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16).save_pretrained(folder)
        module = capture(load_checkpoint(Path(folder)), recipe.torch_dtype, recipe.max_context).module
        PassManager().run(module, recipe.passes, pass_context(target, recipe))
        module.prune_weights()
        program = lower(module)
        files = target.build(program, readers(program, module.weights), BuildContext(recipe.target_options))
        return program, files, MemoryStore({name: materialize(reader) for name, reader in files.weights.items()})


def step(executor: OnnxruntimeExecutor, batch: int, start: int, length: int, admit: bool = False) -> None:
    """One step of ``batch`` sequences."""
    tokens = np.arange(length) % 1000
    group = executor.state_plan.groups[0].name
    rows = tuple(
        SeqStep(i, tokens if admit else None, start, {group: np.array([i])}, sample=True) for i in range(batch)
    )
    greedy = SamplingParams(temperature=0)
    news = tuple(Admission(i, tokens, greedy) for i in range(batch)) if admit else ()
    executor.collect(executor.submit(StepBatch(rows, admit=news)))


def measure(executor: OnnxruntimeExecutor, batch: int, past: int, repeats: int) -> dict[str, float]:
    """Median, p20 and p80 of a decode step in ms after ``past`` tokens; ms of the prefill of one sequence."""
    begin = time.perf_counter()
    step(executor, batch, 0, past, admit=True)
    prefill = (time.perf_counter() - begin) * 1e3 / batch
    times = []
    for i in range(repeats):
        begin = time.perf_counter()
        step(executor, batch, past + i % 32, 1)
        times.append((time.perf_counter() - begin) * 1e3)
    executor.collect(executor.submit(StepBatch((), release=tuple(range(batch)))))
    quantiles = statistics.quantiles(times[4:], n=10)
    median = statistics.median(times[4:])
    row = {"ms": median, "p20": quantiles[1], "p80": quantiles[7], "tok_s": batch / median * 1e3, "prefill_ms": prefill}
    return {key: round(value, 2) for key, value in row.items()}


def main() -> None:
    """Parse, build, print one JSON row a batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="name or path")
    parser.add_argument("--accuracy-level", type=int, help="instead of the recipe's")
    parser.add_argument("--no-native", action="store_true", help="onnxruntime's own kernels alone")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    if args.accuracy_level is not None:
        recipe = replace(recipe, target_options=recipe.target_options | {"accuracy_level": args.accuracy_level})
    if args.no_native:
        recipe = replace(recipe, target_options=recipe.target_options | {"native_kernels": False})
    program, files, store = build(recipe)
    options = LoadOptions(threads=args.threads, max_sequences=max(args.batch), max_context=512)
    executor = loaded(program, files, store, options)
    for batch in args.batch:
        case = {"recipe": args.recipe, **recipe.target_options, "batch": batch}
        average = round(os.getloadavg()[0], 2)
        print(
            json.dumps(
                {**case, "past": args.past, **measure(executor, batch, args.past, args.repeats), "load": average}
            )
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
