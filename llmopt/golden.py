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
    options = LoadOptions(max_sequences=1, max_context=max(lengths, default=1) + NEW_TOKENS)
    executor = load_executor_module("reference").ReferenceExecutor(program, tensors, options)
    return [generate(executor, seq_id, prompt(seq_id, n, program.vocab_size)) for seq_id, n in enumerate(lengths)]


def prompt(seed: int, length: int, vocab_size: int) -> IntArray:
    """``length`` token ids drawn uniformly by a counter-based generator: the same on every machine."""
    return (np.array(uniforms([seed] * length, range(length))) * vocab_size).astype(np.int64)


def generate(executor: Executor, seq_id: int, prompt: IntArray) -> Golden:
    """Greedy continuation of one sequence that has the executor to itself, prompt in one or more chunks."""
    admit: tuple[Admission, ...] = (Admission(seq_id, prompt, SamplingParams(temperature=0)),)
    golden = Golden(prompt=prompt.tolist(), tokens=[], margins=[])
    for start, stop in pieces(executor, len(prompt), len(prompt) + NEW_TOKENS - 1):
        new = prompt[start:stop] if start < len(prompt) else None
        sample = stop >= len(prompt)
        row = SeqStep(seq_id, new, start, blocks(executor, stop), sample=sample, logits="last" if sample else "none")
        output = executor.collect(executor.submit(StepBatch((row,), admit=admit)))
        admit = ()
        if sample:
            best = np.sort(output.logits[seq_id][-1])[-2:]
            golden["tokens"].append(output.sampled[seq_id].token)
            golden["margins"].append(round(float(best[1] - best[0]), 4))
    executor.collect(executor.submit(StepBatch((), release=(seq_id,))))
    return golden
