"""Golden tokens: what the reference target generates greedily from a program, recorded at build for the load-time gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmopt.lower.readers import Reader
from llmopt.program import Program
from llmopt.registry import load_executor_module
from llmopt.runtime.philox import uniforms
from llmopt.runtime.protocol import Admission, Executor, IntArray, SamplingParams, SeqStep, StepBatch
from llmopt.target import LoadOptions

PROMPT_LENGTHS = (5, 12)
NEW_TOKENS = 8
MAX_WEIGHT_BYTES = 2 << 30
"""Above this the reference run would not fit the build's memory promise (4 GB); such artifacts carry no golden tokens."""


def record_golden(program: Program, weights: Mapping[str, Reader]) -> list[dict[str, Any]]:
    """For each fixed prompt: its ids, the greedy continuation, and each choice's lead over the runner-up (logits).

    Empty when the program's weights exceed MAX_WEIGHT_BYTES.
    """
    if sum(reader.weight.nbytes for reader in weights.values()) > MAX_WEIGHT_BYTES:
        return []
    tensors = {name: reader.weight.tensor() for name, reader in weights.items()}
    module = load_executor_module("reference")
    lengths = [n for n in PROMPT_LENGTHS if n + NEW_TOKENS <= program.max_context] or [1]
    options = LoadOptions(max_sequences=1, max_context=max(lengths) + NEW_TOKENS)
    executor = module.ReferenceExecutor(program, tensors, options)
    return [generate(executor, seq_id, prompt(seq_id, n, program.vocab_size)) for seq_id, n in enumerate(lengths)]


def prompt(seed: int, length: int, vocab_size: int) -> IntArray:
    """``length`` token ids drawn uniformly by a counter-based generator: the same on every machine."""
    return (np.array(uniforms([seed] * length, range(length))) * vocab_size).astype(np.int64)


def generate(executor: Executor, seq_id: int, prompt: IntArray) -> dict[str, Any]:
    """Greedy continuation of one sequence that has the executor to itself, prompt in one or more chunks."""
    plan = executor.state_plan
    blocks = {g.name: np.arange(g.blocks_for(len(prompt) + NEW_TOKENS), dtype=np.int64) for g in plan.groups}
    chunk = min((c for g in plan.groups if (c := g.max_chunk())), default=len(prompt))
    admit: tuple[Admission, ...] = (Admission(seq_id, prompt, SamplingParams(temperature=0)),)
    tokens, margins, start = [], [], 0
    while len(tokens) < NEW_TOKENS:
        new = prompt[start : start + chunk] if start < len(prompt) else None
        length = 1 if new is None else len(new)
        ends = start + length >= len(prompt)
        row = SeqStep(seq_id, new, start, blocks, sample=ends, logits="last" if ends else "none")
        output = executor.collect(executor.submit(StepBatch((row,), admit=admit)))
        start, admit = start + length, ()
        if ends:
            best = np.sort(output.logits[seq_id][-1])[-2:]
            tokens.append(output.sampled[seq_id].token)
            margins.append(round(float(best[1] - best[0]), 4))
    executor.collect(executor.submit(StepBatch((), release=(seq_id,))))
    return {"prompt": prompt.tolist(), "tokens": tokens, "margins": margins}
