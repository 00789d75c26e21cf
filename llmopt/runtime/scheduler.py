"""Chooses the rows of each step: continuous batching with chunked prefill (pure logic, no device)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmopt.program import StatePlan
from llmopt.runtime.protocol import Admission, ExecutorLimits, IntArray, SamplingParams, SeqStep, StepBatch
from llmopt.runtime.state import StateAllocator

SCORED_CHUNK = 64
"""Prompt rows of a step whose logits are all wanted: 32 MiB of them at a vocabulary of 128k."""


@dataclass(slots=True, eq=False)
class Scheduled:
    """A sequence as the scheduler sees it.

    ``budget``: tokens it may draw. ``computed``: tokens in the state once every planned step has run.
    ``pending``: tokens drawn by steps in flight, unknown to the host. ``rope_len``: the length its rotary table was
    chosen for (two-table models). ``constrained``: the mask of the next token needs every drawn token to be known.
    ``scored``: the logits of every prompt row are wanted, so rows come in chunks of SCORED_CHUNK.
    """

    seq_id: int
    prompt: IntArray
    sampling: SamplingParams
    budget: int
    output: list[int] = field(default_factory=list)
    computed: int = 0
    pending: int = 0
    rope_len: int = 0
    constrained: bool = False
    scored: bool = False

    @property
    def length(self) -> int:
        """Tokens that exist, pending ones included."""
        return len(self.prompt) + len(self.output) + self.pending

    @property
    def exhausted(self) -> bool:
        """Whether every token of the budget is drawn or being drawn."""
        return len(self.output) + self.pending >= self.budget

    def tokens(self, start: int, stop: int) -> IntArray:
        """Ids at positions ``start … stop-1``; none of them may be pending."""
        if stop <= len(self.prompt):
            return self.prompt[start:stop]
        return np.concatenate((self.prompt, np.array(self.output, np.int64)))[start:stop]


@dataclass(frozen=True)
class Plan:
    """A step to submit, and the sequences it draws a token for."""

    batch: StepBatch
    sampled: tuple[int, ...]


@dataclass(slots=True)
class _Step:
    """Rows gathered so far, and the room left for more tokens and sequences."""

    room: int
    sequences: int
    rows: list[SeqStep] = field(default_factory=list)
    admit: list[Admission] = field(default_factory=list)

    @property
    def open(self) -> bool:
        return self.room > 0 and len(self.rows) < self.sequences


class Scheduler:
    """First come, first served, continuously batched.

    A step takes one row of every decoding sequence, then prompt chunks of the running ones, then of newly admitted
    ones, each in order of arrival and within the limits. A waiting sequence is admitted when blocks for all its
    tokens are free; nobody overtakes it. A running sequence that finds no block for its next token preempts
    the youngest running one, which gives up its blocks and waits, first in line, to be computed again.
    """

    def __init__(self, plan: StatePlan, limits: ExecutorLimits) -> None:
        self.limits = limits
        self.allocator = StateAllocator(plan, limits.blocks)
        self.max_chunk = min((c for g in plan.groups if (c := g.max_chunk()) is not None), default=None)
        capacity = self.allocator.capacity()
        self.context = limits.max_context if capacity is None else min(limits.max_context, capacity)
        self.waiting: deque[Scheduled] = deque()
        self.running: dict[int, Scheduled] = {}
        self.preemptions = 0
        self._releases: list[int] = []

    def add(
        self,
        seq_id: int,
        prompt: Sequence[int],
        sampling: SamplingParams,
        budget: int,
        *,
        constrained: bool = False,
        scored: bool = False,
    ) -> None:
        """Queue a sequence that may draw ``budget`` tokens; ``len(prompt) + budget`` must be within ``context``."""
        ids = np.array(prompt, np.int64)
        self.waiting.append(Scheduled(seq_id, ids, sampling, budget, constrained=constrained, scored=scored))

    def finish(self, seq_id: int) -> None:
        """Forget a sequence, running or waiting; the executor hears of it with the next step."""
        if sequence := self.running.pop(seq_id, None):
            self._give_up(sequence)
        else:
            self.waiting = deque(s for s in self.waiting if s.seq_id != seq_id)

    def sampled(self, seq_id: int, token: int) -> bool:
        """A pending token is known. False when the sequence has ended since: the token is an overrun."""
        sequence = self.running.get(seq_id)
        if sequence is None:
            return False
        sequence.output.append(token)
        sequence.pending -= 1
        return True

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs, or the executor must still hear of a release."""
        return bool(self.waiting or self.running or self._releases)

    def plan(self) -> Plan | None:
        """The next step; None when no work is left or the step in flight must be collected first."""
        if not self._reserve():
            return None
        step = _Step(self.limits.max_tokens_per_step, self.limits.max_sequences)
        ready = [s for s in self.running.values() if not (s.exhausted or (s.constrained and s.pending))]
        for sequence in sorted(ready, key=lambda s: s.length - s.computed > 1):  # stable: decode rows first
            if step.open:
                self._add_rows(step, sequence)
        while self.waiting and step.open and self._admit(step):
            pass
        batch = StepBatch(tuple(step.rows), admit=tuple(step.admit), release=tuple(self._releases))
        self._releases = []
        if not (batch.rows or batch.release):
            return None
        return Plan(batch, tuple(row.seq_id for row in batch.rows if row.sample))

    def _reserve(self) -> bool:
        """Blocks for every running sequence's next rows; False: the step in flight must be collected first.

        Preempting, and starting over with the other rotary table, need every drawn token to be known.
        """
        for sequence in list(self.running.values()):
            if sequence.exhausted or sequence.seq_id not in self.running:
                continue
            if self._crosses(sequence):
                if sequence.pending:
                    return False
                sequence.computed = 0
            while sequence.seq_id in self.running:
                if self.allocator.extend(sequence.seq_id, sequence.length):
                    break
                if any(s.pending for s in self.running.values()):
                    return False
                self._preempt()
        return True

    def _crosses(self, sequence: Scheduled) -> bool:
        """Whether the next row needs the other rotary table than the rows in the state."""
        switch = self.limits.rope_switch
        return switch is not None and sequence.computed > 0 and sequence.rope_len <= switch < sequence.length

    def _preempt(self) -> None:
        _, victim = self.running.popitem()
        self._give_up(victim)
        victim.computed = 0
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _give_up(self, sequence: Scheduled) -> None:
        self.allocator.release(sequence.seq_id)
        self._releases.append(sequence.seq_id)

    def _admit(self, step: _Step) -> bool:
        """Start the first waiting sequence, if there is room for it."""
        sequence = self.waiting[0]
        # A step releases after its rows: a sequence preempted for this one can come back with the next at the earliest.
        if len(self.running) >= self.limits.max_sequences or sequence.seq_id in self._releases:
            return False
        if not self.allocator.extend(sequence.seq_id, sequence.length):
            return False
        self.running[sequence.seq_id] = self.waiting.popleft()
        output = np.array(sequence.output, np.int64)
        step.admit.append(Admission(sequence.seq_id, sequence.prompt, sequence.sampling, output))
        self._add_rows(step, sequence)
        return True

    def _add_rows(self, step: _Step, sequence: Scheduled) -> None:
        """As many of the sequence's missing rows as the step has room for; the last one draws a token."""
        missing = sequence.length - sequence.computed
        scoring = sequence.scored and sequence.computed < len(sequence.prompt)
        count = min(missing, step.room, self.max_chunk or missing, SCORED_CHUNK if scoring else missing)
        start, stop = sequence.computed, sequence.computed + count
        if start == 0:
            sequence.rope_len = sequence.length
        last_drawn = missing == 1 and bool(sequence.output or sequence.pending)
        row = SeqStep(
            sequence.seq_id,
            None if last_drawn else sequence.tokens(start, stop),
            start,
            self.allocator.table(sequence.seq_id, stop),
            sample=count == missing,
            logits="all" if scoring else "none",
            rope_len=sequence.rope_len,
        )
        step.rows.append(row)
        step.room -= count
        sequence.computed = stop
        sequence.pending += count == missing
