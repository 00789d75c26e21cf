"""The golden-token gate: an executor must generate what the reference target generated when the artifact was built."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from llmopt.errors import ExecutorError
from llmopt.runtime.protocol import Admission, Executor, IntArray, SamplingParams, SeqStep, StepBatch

if TYPE_CHECKING:
    from llmopt.artifact.manifest import Golden

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2, "int8": 1e-1}
"""Lead a choice must have, relative to the largest logit, to count: below it rounding may decide. ``int8`` is
for quantized activations."""


def check_golden(executor: Executor, golden: Iterable[Golden], *, dtype: str) -> int:
    """Run each prompt alone, feeding the golden tokens back, and compare every greedy choice.

    ``dtype`` names the entry of TOLERANCES. Returns the number of choices compared (those that led by more than the
    tolerance). Prompts longer than the executor's context are left out. Raises ExecutorError at the first difference.
    """
    compared = 0
    for seq_id, entry in enumerate(golden):
        compared += check_one(executor, -1 - seq_id, entry, TOLERANCES[dtype])
    return compared


def check_one(executor: Executor, seq_id: int, entry: Golden, tolerance: float) -> int:
    """Choices compared for one prompt."""
    prompt, tokens = np.array(entry["prompt"], np.int64), entry["tokens"]
    if len(prompt) + len(tokens) > executor.limits.max_context:
        return 0
    fed = np.concatenate((prompt, np.array(tokens[:-1], np.int64)))
    admit: tuple[Admission, ...] = (Admission(seq_id, prompt, SamplingParams(temperature=0)),)
    compared, choices = 0, zip(tokens, entry["margins"], strict=True)
    for start, stop in pieces(executor, len(prompt), len(fed)):
        done = stop >= len(prompt)
        row = SeqStep(
            seq_id, fed[start:stop], start, blocks(executor, stop), sample=done, logits="last" if done else "none"
        )
        output = executor.collect(executor.submit(StepBatch((row,), admit=admit)))
        admit = ()
        if not done:
            continue
        token, margin = next(choices)
        largest = float(np.abs(output.logits[seq_id][-1]).max())
        if not np.isfinite(largest) or margin > tolerance * largest:
            compared += 1
            found = output.sampled[seq_id].token
            if found != token:
                what = f"golden tokens differ: token {token} was expected after {stop}, {found} came (lead {margin:g})"
                raise ExecutorError(what, hint="this device or library computes the model wrongly; use another")
    executor.collect(executor.submit(StepBatch((), release=(seq_id,))))
    return compared


def pieces(executor: Executor, prompt: int, total: int) -> list[tuple[int, int]]:
    """(start, stop) of each step: prompt chunks as the states and limits allow, then one token each."""
    limits = [c for g in executor.state_plan.groups if (c := g.max_chunk())]
    size = min([executor.limits.max_tokens_per_step, *limits])
    chunks = [(start, min(start + size, prompt)) for start in range(0, prompt, size)]
    return chunks + [(at, at + 1) for at in range(prompt, total)]


def blocks(executor: Executor, tokens: int) -> dict[str, IntArray]:
    """The first blocks of every group: nothing else runs yet."""
    return {g.name: np.arange(g.blocks_for(tokens), dtype=np.int64) for g in executor.state_plan.groups}
