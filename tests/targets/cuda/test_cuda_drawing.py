"""A plan's sampling launches end to end, on the CPU: mixed steps draw what the host sampler draws from their logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmopt.runtime.executors.cuda.executor import CudaExecutor
from llmopt.runtime.protocol import Admission, IntArray, Sampled, SamplingParams, SeqStep, StepBatch
from llmopt.runtime.sampler import HostSampler
from targets.cuda.options import CudaOptions
from tests.targets.cuda.models import interpreted, model
from tests.targets.cuda.simple import KERNELS

KINDS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=3),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=1.0, logprobs=2),
    SamplingParams(temperature=1.3, presence_penalty=0.5, logit_bias={5: 4.0}, seed=2**63),
)
PROMPTS = tuple(np.array(p, np.int64) for p in ([3, 1, 4], [1, 5], [9, 2, 6], [5, 3]))
OPTIONS = CudaOptions(decode_buckets=(4,), extend_buckets=(16,), extend_sequences=(4,))


def allowed(vocab_size: int, step: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """A mask for the last sequence, another one each step."""
    bits = np.random.default_rng(step).integers(0, 2, -(-vocab_size // 32) * 32).astype(bool)
    return np.packbits(bits, bitorder="little").view(np.uint32)


def run(executor: CudaExecutor, params: tuple[SamplingParams, ...], steps: int) -> list[list[Sampled]]:
    """Sequences that decode together, what each step drew; every step is checked against the host sampler."""
    vocab = executor.limits.vocab_size
    sampler = HostSampler(vocab)
    admissions = tuple(Admission(i, prompt, p) for i, (prompt, p) in enumerate(zip(PROMPTS, params)))
    for admission in admissions:
        sampler.admit(admission)
    drawn: list[list[Sampled]] = []
    for step in range(steps):
        rows = tuple(row(i, prompt, step) for i, prompt in enumerate(PROMPTS))
        masks = {3: allowed(vocab, step)} if step % 2 else {}
        batch = StepBatch(rows, admit=() if step else admissions, masks=masks)
        output = executor.collect(executor.submit(batch))
        logits = np.concatenate([output.logits[i] for i in range(len(PROMPTS))])
        expected = sampler.sample_rows(range(len(PROMPTS)), logits, masks)
        found = [output.sampled[i] for i in range(len(PROMPTS))]
        assert [s.token for s in found] == [s.token for s in expected]
        assert [i for i, _ in found[2].top] == [i for i, _ in expected[2].top]
        assert found[2].logprob == pytest.approx(expected[2].logprob, abs=1e-4)
        drawn.append(found)
    return drawn


def row(seq_id: int, prompt: IntArray, step: int) -> SeqStep:
    """A sequence's part of a step, in a block of its own."""
    tokens = None if step else prompt
    start = len(prompt) + step - 1 if step else 0
    return SeqStep(seq_id, tokens, start, {"paged": np.array([seq_id])}, sample=True, logits="last")


@pytest.mark.slow
def test_mixed_steps_draw_what_the_host_draws() -> None:
    found = interpreted(model("llama-tied"), KERNELS, OPTIONS)
    drawn = run(found, KINDS, 3)
    # The sequences end; others take their places, with parameters that must replace the old ones.
    found.collect(found.submit(StepBatch((), release=(0, 1, 2, 3))))
    again = run(found, (KINDS[2], KINDS[0], replace(KINDS[2], logprobs=1), KINDS[1]), 2)
    assert [[s.token for s in step] for step in drawn[:2]] != [[s.token for s in step] for step in again]
