"""Sequences through the cuda executor draw what they draw alone: every way to draw, run-ahead, masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmopt.runtime.core import EngineCore
from llmopt.runtime.executors.cuda.executor import CudaExecutor
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import (
    NO_TOKEN,
    Admission,
    IntArray,
    Sampled,
    SamplingParams,
    SeqStep,
    StepBatch,
)
from llmopt.runtime.sampler import HostSampler
from tests.runtime.cuda_formula import (
    PLACES,
    VOCAB,
    WORDS,
    Formula,
    admit,
    executor,
    formula,
    without,
)

KINDS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 0.8, "top_k": 9}, {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0, "logprobs": 2}, {"temperature": 1.1, "top_p": 0.7, "frequency_penalty": 0.9, "logprobs": 0},
    {"temperature": 1.4, "min_p": 0.05, "presence_penalty": 1.5}, {"temperature": 0, "logit_bias": {3: 9.0, 60: 8.9}},
]  # fmt: skip
"""Every way to draw."""


def params(index: int) -> GenerationParams:
    """The kinds in turn."""
    sampling = SamplingParams(seed=2**62 + index, **KINDS[index % len(KINDS)])
    return GenerationParams(max_tokens=5 + index % 9, sampling=sampling, ignore_eos=True)


PROMPTS = [[(7 * i + j) % VOCAB for j in range(1 + 5 * i % 23)] for i in range(9)]


def expected(prompt: list[int], chosen: GenerationParams) -> list[Sampled]:
    """What a sequence draws when it is alone on the host."""
    sampler = HostSampler(VOCAB)
    sampler.admit(Admission(0, np.array(prompt), chosen.sampling))
    history, found = list(prompt), []
    for _ in range(chosen.max_tokens or 0):
        found += sampler.sample_rows([0], formula(np.array(history))[None])
        history.append(found[-1].token)
    return found


def generate(found: CudaExecutor, chosen: list[GenerationParams]) -> list[list[Sampled]]:
    """What the engine gives each of the prompts."""
    core = EngineCore(found)
    ids = [core.add(p, c) for p, c in zip(PROMPTS, chosen)]
    outputs: dict[int, list[Sampled]] = {i: [] for i in ids}
    while core.has_work:
        for output in core.step():
            outputs[output.request_id].append(output.sampled)
    return [outputs[i] for i in ids]


def close(ours: Sampled, theirs: Sampled) -> bool:
    """Equal, log-probabilities up to fp32."""
    numbers = [(ours.logprob, theirs.logprob), *((a, b) for (_, a), (_, b) in zip(ours.top, theirs.top))]
    same = ours.token == theirs.token and [i for i, _ in ours.top] == [i for i, _ in theirs.top]
    return same and all(a == b or abs(a - b) < 1e-5 for a, b in numbers)  # type: ignore[operator]


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("greedy", [True, False])
def test_every_sequence_draws_what_it_draws_alone(ahead: int, greedy: bool) -> None:
    found = executor()
    found.limits = replace(found.limits, steps_in_flight=ahead)
    chosen = [params(len(KINDS) * i if greedy else i) for i in range(9)]
    drawn, alone = generate(found, chosen), [expected(p, c) for p, c in zip(PROMPTS, chosen)]
    assert all(
        close(a, b) for ours, theirs in zip(drawn, alone, strict=True) for a, b in zip(ours, theirs, strict=True)
    )
    assert sorted(found.free) == list(range(PLACES))
    kinds = {tail.draw for tail in found.backend.tails}  # type: ignore[attr-defined]
    assert "full" not in kinds if greedy else "full" in kinds


@pytest.mark.parametrize("forgets", ["seed", "history", "bias_ids", "positions"])
def test_a_device_that_forgets_draws_something_else(forgets: str) -> None:
    backend = Formula()
    backend.forgets = forgets
    chosen = [params(i) for i in range(9)]
    tokens = [[s.token for s in drawn] for drawn in generate(executor(backend), chosen)]
    assert tokens != [[s.token for s in expected(p, c)] for p, c in zip(PROMPTS, chosen)]


def test_preempted_sequences_go_on_as_before() -> None:
    """With blocks for two sequences, what was drawn before counts when the counts are built again."""
    chosen = [replace(params(i), max_tokens=20) for i in (2, 4, 5, 1, 2, 4, 5, 1, 4)]
    backend = Formula(blocks=16)
    drawn = generate(executor(backend), chosen)
    assert [[s.token for s in d] for d in drawn] == [[s.token for s in expected(p, c)] for p, c in zip(PROMPTS, chosen)]


def test_counts_are_rebuilt_from_the_output() -> None:
    prompt, output = np.array([5, 6]), np.array([9, 9, 8])
    sampling = SamplingParams(temperature=0, repetition_penalty=1.9, frequency_penalty=1.5)
    history = np.concatenate((prompt, output))
    row = SeqStep(0, history, 0, {"paged": np.arange(2)}, sample=True)
    found = executor()
    ticket = found.submit(StepBatch((row,), admit=(Admission(0, prompt, sampling, output),)))
    counts = np.bincount(np.append(output, found.collect(ticket).sampled[0].token), minlength=VOCAB) * 2
    counts[prompt] += 1
    kept = found.backend.kept["history"][found.sequences[0].place]  # type: ignore[attr-defined]
    assert np.array_equal(kept, counts)


def test_drawing_brings_no_logits_back() -> None:
    found = executor()
    generate(found, [params(i) for i in range(9)])
    tails = found.backend.tails  # type: ignore[attr-defined]
    assert {len(tail.logits) for tail in tails} == {0}
    assert {tail.reports for tail in tails} == {True, False}


class LateMasks(dict[int, npt.NDArray[np.uint32]]):
    """Masks that may not be read before the forward pass is on its way."""

    def __init__(self, masks: Mapping[int, npt.NDArray[np.uint32]], backend: Formula) -> None:
        super().__init__(masks)
        self.backend = backend

    def __getitem__(self, seq_id: int) -> npt.NDArray[np.uint32]:
        assert len(self.backend.forwarded) == len(self.backend.results) + 1
        return super().__getitem__(seq_id)


def masked_step(backend: Formula) -> tuple[list[int], list[IntArray]]:
    """Tokens of four sequences, the second and third masked; the orders of their logits, best first."""
    found, prompts = executor(backend), [np.array([5, i]) for i in range(4)]
    orders = [np.argsort(-formula(p)) for p in prompts]
    rows = tuple(SeqStep(i, p, 0, {"paged": np.array([i])}, sample=True) for i, p in enumerate(prompts))
    masks = LateMasks({1: without(orders[1][0]), 2: without(*orders[2][:2])}, backend)
    admissions = tuple(a for i, p in enumerate(prompts) for a in admit(i, p, logprobs=1 if i == 3 else None))
    output = found.collect(found.submit(StepBatch(rows, admit=admissions, masks=masks)))
    assert [i for i, _ in output.sampled[3].top] == [orders[3][0]]
    return [output.sampled[i].token for i in range(4)], orders


def test_masks_are_read_after_the_forward_pass_and_hold_for_their_rows() -> None:
    tokens, orders = masked_step(Formula())
    assert tokens == [orders[0][0], orders[1][1], orders[2][2], orders[3][0]]
    forgetful = Formula()
    forgetful.forgets = "masks"
    assert masked_step(forgetful)[0] == [order[0] for order in orders]


def test_a_mask_that_allows_nothing_draws_no_token() -> None:
    found, prompt = executor(), np.array([5, 6])
    row = SeqStep(0, prompt, 0, {"paged": np.arange(1)}, sample=True)
    nothing = {0: np.zeros(WORDS, np.uint32)}
    ticket = found.submit(StepBatch((row,), admit=admit(0, prompt), masks=nothing))
    assert found.collect(ticket).sampled[0].token == NO_TOKEN
    assert found.collect(found.submit(StepBatch((row,)))).sampled[0].token == formula(prompt).argmax()
