"""Drives an executor with teacher-forced ragged batches: chunked prefills and decodes mixed, block tables shuffled."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from llmopt.runtime.protocol import Admission, Executor, FloatArray, IntArray, SamplingParams, SeqStep, StepBatch


class RaggedDriver:
    """Feeds whole token sequences through an executor and collects the logits of every row.

    ``prompt`` tokens of each sequence go in chunks, the rest one by one, as decodes. Sequences start at different
    steps, so that prefill chunks and decode rows meet in one batch. ``shift`` is added to the position of every row
    after a sequence's first chunk (0 in honest runs; a shift of all rows would cancel in rotary attention).
    """

    def __init__(self, executor: Executor, seed: int = 0, shift: int = 0) -> None:
        self.executor, self.shift = executor, shift
        self.random = random.Random(seed)
        self.free = {name: self._shuffled(count) for name, count in executor.limits.blocks.items()}

    def _shuffled(self, count: int) -> list[int]:
        order = list(range(count))
        self.random.shuffle(order)
        return order

    def logits(self, sequences: list[IntArray], prompts: list[int], chunk: int = 4) -> list[FloatArray]:
        """(tokens, vocab) logits of each sequence."""
        groups = self.executor.state_plan.groups
        chunk = min([chunk, *(c for g in groups if (c := g.max_chunk()))])
        plans = [list(pieces(len(s), p, chunk)) for s, p in zip(sequences, prompts)]
        blocks: list[dict[str, list[int]]] = [{g.name: [] for g in groups} for _ in sequences]
        found: list[list[FloatArray]] = [[] for _ in sequences]
        for step in range(max(2 * i + len(p) for i, p in enumerate(plans))):
            live = [i for i, p in enumerate(plans) if 0 <= step - 2 * i < len(p)]
            rows = tuple(self._row(i, sequences[i], *plans[i][step - 2 * i], blocks[i]) for i in live)
            admit = tuple(
                Admission(i, sequences[i][: prompts[i]], SamplingParams(temperature=0)) for i in live if step == 2 * i
            )
            output = self.executor.collect(self.executor.submit(StepBatch(rows, admit=admit)))
            for i in live:
                found[i].append(output.logits[i])
        return [np.concatenate(parts) for parts in found]

    def _row(self, index: int, tokens: IntArray, start: int, stop: int, blocks: dict[str, list[int]]) -> SeqStep:
        for group in self.executor.state_plan.groups:
            while len(blocks[group.name]) < group.blocks_for(stop):
                blocks[group.name].append(self.free[group.name].pop())
        tables = {name: np.array(ids, np.int64) for name, ids in blocks.items()}
        positions = np.arange(start, stop) + self.shift if self.shift and start else None
        return SeqStep(index, tokens[start:stop], start, tables, logits="all", positions=positions)


def pieces(length: int, prompt: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each step of a sequence."""
    for start in range(0, prompt, chunk):
        yield start, min(prompt, start + chunk)
    for start in range(prompt, length):
        yield start, start + 1
