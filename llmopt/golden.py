"""Golden tokens: the reference target's greedy choices, recorded at build for the gate at load."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmopt.artifact.manifest import Golden
from llmopt.lower.readers import Reader
from llmopt.program import Program
from llmopt.registry import load_executor_module
from llmopt.runtime.golden import blocks, pieces
from llmopt.runtime.philox import uniforms
from llmopt.runtime.protocol import Admission, Executor, IntArray, SamplingParams, SeqStep, StepBatch
from llmopt.target import LoadOptions

PROMPT_LENGTHS = (5, 12)
NEW_TOKENS = 8
MAX_WEIGHT_BYTES = 2 << 30
"""Above this the reference run would not fit the build's memory promise (4 GB): no golden tokens are recorded."""


def record_golden(program: Program, weights: Mapping[str, Reader]) -> list[Golden]:
    """For each fixed prompt: its ids, the greedy continuation, and each choice's lead over the runner-up (logits).

    Empty when the program's weights exceed MAX_WEIGHT_BYTES.
    """
    if sum(reader.weight.nbytes for reader in weights.values()) > MAX_WEIGHT_BYTES:
        return []
    tensors = {name: reader.weight.tensor() for name, reader in weights.items()}
    lengths = [n for n in PROMPT_LENGTHS if n + NEW_TOKENS <= program.max_context]
    options = LoadOptions(max_sequences=len(lengths), max_context=max(lengths, default=1) + NEW_TOKENS)
    executor = load_executor_module("reference").ReferenceExecutor(program, tensors, options)
    return generate(executor, [prompt(seed, n, program.vocab_size) for seed, n in enumerate(lengths)])


def prompt(seed: int, length: int, vocab_size: int) -> IntArray:
    """``length`` token ids drawn uniformly by a counter-based generator: the same on every machine."""
    return (np.array(uniforms([seed] * length, range(length))) * vocab_size).astype(np.int64)


def generate(executor: Executor, prompts: list[IntArray]) -> list[Golden]:
    """Greedy continuations of prompts, side by side: a step reads the weights once."""
    admit = tuple(Admission(i, p, SamplingParams(temperature=0)) for i, p in enumerate(prompts))
    golden = [Golden(prompt=p.tolist(), tokens=[], margins=[]) for p in prompts]
    plans = [pieces(executor, len(p), len(p) + NEW_TOKENS - 1) for p in prompts]
    for step in range(max(map(len, plans), default=0)):
        live = [i for i, plan in enumerate(plans) if step < len(plan)]
        rows = tuple(row(executor, i, prompts[i], *plans[i][step], len(prompts)) for i in live)
        output = executor.collect(executor.submit(StepBatch(rows, admit=admit if step == 0 else ())))
        for i, sampled in output.sampled.items():
            best = np.sort(output.logits[i][-1])[-2:]
            golden[i]["tokens"].append(sampled.token)
            golden[i]["margins"].append(round(float(best[1] - best[0]), 4))
    return golden


def row(executor: Executor, index: int, prompt: IntArray, start: int, stop: int, count: int) -> SeqStep:
    """A sequence's part of a step; sequence i of ``count`` owns every count-th block."""
    new = prompt[start:stop] if start < len(prompt) else None
    tables = {name: ids * count + index for name, ids in blocks(executor, stop).items()}
    sample = stop >= len(prompt)
    return SeqStep(index, new, start, tables, sample=sample, logits="last" if sample else "none")
