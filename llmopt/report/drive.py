"""Drives an executor without a scheduler: sequence i owns the i-th share of every state group's blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from llmopt.errors import ConfigError
from llmopt.runtime.protocol import Admission, Executor, IntArray, SamplingParams, SeqStep, StepBatch, StepOutput

GREEDY = SamplingParams(temperature=0)


class Driver:
    """Runs up to ``capacity`` sequences of at most ``length`` tokens through ``executor``.

    Raises ConfigError when the executor has no room for one.
    """

    def __init__(self, executor: Executor, length: int) -> None:
        limits, groups = executor.limits, executor.state_plan.groups
        if length > limits.max_context:
            raise ConfigError(f"{length} tokens exceed the context of {limits.max_context}")
        self.executor, self.groups, self.length = executor, groups, length
        self.capacity = min([limits.max_sequences, *(limits.blocks[g.name] // g.blocks_for(length) for g in groups)])
        chunks = [c for g in groups if (c := g.max_chunk()) is not None]
        self.max_chunk = min([limits.max_tokens_per_step, *chunks])
        self.require(1)

    def require(self, count: int) -> None:
        """Raise ConfigError unless ``count`` sequences fit."""
        if count > self.capacity:
            raise ConfigError(
                f"the executor has room for {self.capacity} sequences of {self.length} tokens, not {count}"
            )

    def blocks(self, index: int) -> dict[str, IntArray]:
        """Block ids of the index-th sequence, by group."""
        sizes = {g.name: g.blocks_for(self.length) for g in self.groups}
        return {name: np.arange(index * n, (index + 1) * n, dtype=np.int64) for name, n in sizes.items()}

    def step(self, rows: Sequence[SeqStep], admit: Sequence[Admission] = (), release: Sequence[int] = ()) -> StepOutput:
        """Submit one step and wait for it."""
        return self.executor.collect(
            self.executor.submit(StepBatch(tuple(rows), admit=tuple(admit), release=tuple(release)))
        )

    def prefill(
        self,
        index: int,
        prompt: IntArray,
        sample: bool = False,
        logits: Literal["none", "all"] = "none",
        max_chunk: int | None = None,
    ) -> Iterator[StepOutput]:
        """Admit sequence ``index`` and run its prompt chunk by chunk; the last step samples when asked."""
        admit: tuple[Admission, ...] = (Admission(index, prompt, GREEDY),)
        size = min(max_chunk or self.max_chunk, self.max_chunk)
        for start in range(0, len(prompt), size):
            chunk = prompt[start : start + size]
            last = start + len(chunk) == len(prompt)
            yield self.step(
                [SeqStep(index, chunk, start, self.blocks(index), sample=sample and last, logits=logits)], admit
            )
            admit = ()

    def decode(self, count: int, length: int) -> StepOutput:
        """One greedy step of sequences 0..count-1, each holding ``length`` tokens in its state."""
        return self.step([SeqStep(i, None, length, self.blocks(i), sample=True) for i in range(count)])

    def release(self, indices: Sequence[int]) -> None:
        """Forget sequences."""
        self.step((), release=indices)
