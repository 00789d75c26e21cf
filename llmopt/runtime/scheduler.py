"""Chooses the rows of each step: continuous batching with chunked prefill (pure logic, no device)."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from llmopt.program import StatePlan
from llmopt.runtime.clock import Clock
from llmopt.runtime.decoding import Decoding, Drawn
from llmopt.runtime.fairness import WaitingQueue
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.plan import Plan, Stats, StepRows
from llmopt.runtime.protocol import Admission, DecodeRows, ExecutorLimits, IntArray, SeqStep, StepBatch
from llmopt.runtime.residence import Residence
from llmopt.runtime.sequence import Sequence

SCORED_CHUNK = 64
"""Prompt rows of a step whose logits are all wanted: 32 MiB of them at a vocabulary of 128k."""


class Scheduler:
    """Continuous batching over counted blocks.

    A step takes one row of every decoding sequence, then prompt chunks of the running ones, then of newly admitted
    ones, the most urgent first and within the limits. Who is admitted next the queue says; nobody overtakes it,
    unless it waits for a prefix that another sequence is computing. A running sequence that finds no block for its
    next token, and a waiting one of a better priority, preempt the least urgent running one: its state goes to host
    memory when that is cheaper than computing it again, and it waits at its old place in line.
    """

    def __init__(
        self,
        plan: StatePlan,
        limits: ExecutorLimits,
        options: SchedulerOptions | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.limits, self.clock = limits, clock
        self.options = options or SchedulerOptions()
        self.states = Residence(plan, limits, self.options)
        self.allocator, self.cache, self.swap = self.states.allocator, self.states.cache, self.states.swap
        self.queue = WaitingQueue(self.options.queue, clock)
        self.step_tokens = min(limits.max_tokens_per_step, self.options.step_tokens or limits.max_tokens_per_step)
        self.max_chunk = min((c for g in plan.groups if (c := g.max_chunk()) is not None), default=None)
        capacity = self.allocator.capacity()
        self.context = limits.max_context if capacity is None else min(limits.max_context, capacity)
        self.sequences: dict[int, Sequence] = {}
        self.running: dict[int, Sequence] = {}
        self.prefilling: dict[int, Sequence] = {}
        self.decoding = Decoding(limits.max_sequences)
        self._counted = Stats()
        self._priorities: Counter[int] = Counter()
        self._deadlines: list[tuple[float, int]] = []
        self._releases: list[int] = []
        self._stuck = (-1, -1)
        self._orders = 0

    # --- requests ----------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its prompt and budget together must be within ``context``."""
        self._orders += 1
        sequence.order, sequence.arrival = self._orders, self.clock()
        if sequence.deadline is not None:
            heapq.heappush(self._deadlines, (sequence.deadline, sequence.seq_id))
        self.sequences[sequence.seq_id] = sequence
        self.queue.shares.enter(sequence.tenant)
        self.queue.push(sequence)

    def finish(self, seq_id: int) -> None:
        """Forget a sequence, running or waiting; the executor hears of it with the next step."""
        sequence = self.sequences.pop(seq_id, None)
        if sequence is None:
            return
        self.queue.shares.exit(sequence.tenant)
        if seq_id in self.running:
            self._stop(sequence)
            return
        self.queue.remove(sequence)
        self.states.drop(sequence)

    def expired(self) -> list[int]:
        """Sequences whose deadline has passed."""
        now, late = self.clock(), []
        while self._deadlines and self._deadlines[0][0] <= now:
            late.append(heapq.heappop(self._deadlines)[1])
        return [seq_id for seq_id in late if seq_id in self.sequences]

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs, or the executor must still hear of something."""
        return bool(self.sequences or self._releases or self.states.ops)

    def stats(self) -> Stats:
        """What there is to know for metrics, at this moment."""
        cached = self.cache.cached()
        pools = {name: pool for name, pool in self.allocator.pools.items() if pool.total}
        used = {name: pool.total - pool.free - cached[name] for name, pool in pools.items()}
        fullest = max(used, key=lambda name: used[name] / pools[name].total, default=None)
        return replace(
            self._counted,
            prompt_tokens=self.states.prompt_tokens,
            cached_tokens=self.states.cached_tokens,
            running=len(self.running),
            waiting=len(self.queue),
            kv_blocks=0 if fullest is None else pools[fullest].total,
            kv_blocks_used=0 if fullest is None else used[fullest],
            swapped_bytes=self.swap.used,
        )

    # --- a step ------------------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step; None when no work is left or the step in flight must be collected first."""
        self.queue.wake()
        if not (self._make_way() and self._reserve()):
            return None
        places = self.decoding.ready(min(self.step_tokens, self.limits.max_sequences))
        step = StepRows(self._room(len(places)), self.limits.max_sequences - len(places))
        decode = self._decode(places)
        for sequence in self._in_order(self.prefilling.values()):
            if step.open:
                self._add_rows(step, sequence)
        while step.open and self._admit(step):
            pass
        for row in step.rows:
            self.cache.progress(row.seq_id, row.start + row.query_len)
        batch = StepBatch(
            tuple(step.rows),
            admit=tuple(step.admit),
            release=tuple(self._releases),
            ops=tuple(self.states.ops),
            decode=decode,
        )
        self._releases, self.states.ops = [], []
        if not (batch.rows or batch.decode or batch.release or batch.ops):
            return None
        return Plan(batch, *self._drawn(step, places))

    def _room(self, decoding: int) -> int:
        """Prompt tokens of a step beside so many decoding rows. A chunk grows into the rows that its step would be
        padded with: those take their time anyway."""
        room = self.step_tokens - decoding
        if self.options.chunk is None or not self.decoding.going():
            return room
        asked = decoding + min(room, self.options.chunk)
        padded = next((rows for rows in self.limits.row_buckets if rows >= asked), asked)
        return min(room, padded - decoding)

    def _decode(self, places: IntArray) -> DecodeRows | None:
        """Rows for these places of the decoding sequences."""
        if not len(places):
            return None
        decoding = self.decoding
        starts = decoding.starts[places]
        blocks = self.allocator.gather(places, int(starts.max()) + 1)
        decoding.starts[places] += 1
        return DecodeRows(decoding.ids[places], starts, decoding.rope_lens[places], blocks)

    def _drawn(self, step: StepRows, places: IntArray) -> tuple[Drawn, tuple[int, ...]]:
        """Every sequence the step draws a token for, and which of them are constrained."""
        joined = [self.allocator.place(s.seq_id) for s in step.drawing]
        everyone = np.concatenate((places, np.array(joined, np.int64))) if joined else places
        for tenant, count in self.decoding.shares(everyone).items():
            self.queue.shares.charge(tenant, count * self.options.queue.output_weight)
        drawn = Drawn(self.decoding.ids[everyone], everyone)
        masked = drawn.seq_ids[self.decoding.constrained[everyone]]
        return drawn, tuple(masked.tolist())

    def learn(self, drawn: Drawn) -> npt.NDArray[np.bool_]:
        """The tokens of a step are known; False (n,) where the sequence has ended since: its token is an overrun."""
        return self.decoding.learn(drawn)

    def took(self, plan: Plan, seconds: float) -> None:
        """How long a step with prompt rows took: those that are mostly prompt tell the rate of prefill."""
        rows = sum(row.query_len for row in plan.batch.rows)
        if rows > len(plan.drawn.seq_ids):
            self.swap.observe(rows, seconds)

    def _add_rows(self, step: StepRows, sequence: Sequence) -> None:
        """As many of the sequence's missing rows as the step has room for; the last one draws a token."""
        missing = sequence.known - sequence.computed
        scoring = sequence.scored and sequence.computed < len(sequence.prompt)
        count = min(missing, step.room, self.max_chunk or missing, SCORED_CHUNK if scoring else missing)
        start, stop = sequence.computed, sequence.computed + count
        row = SeqStep(
            sequence.seq_id,
            sequence.tokens(start, stop),
            start,
            self.allocator.table(sequence.seq_id, stop),
            sample=count == missing,
            logits="all" if scoring else "none",
            rope_len=sequence.rope_len,
        )
        step.rows.append(row)
        step.room -= count
        step.sequences -= 1
        sequence.computed = stop
        if row.sample:
            del self.prefilling[sequence.seq_id]
            self.decoding.join(sequence, self.allocator.place(sequence.seq_id))
            step.drawing.append(sequence)

    # --- coming in ---------------------------------------------------------------------------------------------

    def _admit(self, step: StepRows) -> bool:
        """Start who is next, if there is room for it; False ends the admissions of this step."""
        if len(self.running) >= self.limits.max_sequences or self._stuck == self._changes():
            return False
        sequence = self.queue.first()
        # A step releases after its rows: a sequence preempted for this one can come back with the next at the earliest.
        if sequence is None or sequence.seq_id in self._releases:
            return False
        first = not sequence.rope_len
        if not self.states.bring_in(sequence, self.running):
            if sequence.awaits is not None:
                self.queue.park(sequence)
                return True
            self._stuck = self._changes()
            return False
        self.queue.remove(sequence)
        if first:  # who is preempted does not pay twice
            served = (sequence.known - sequence.computed) * self.options.queue.prompt_weight
            self.queue.shares.charge(sequence.tenant, served)
            sequence.waited = self.clock() - sequence.arrival
        self.running[sequence.seq_id] = self.prefilling[sequence.seq_id] = sequence
        self._priorities[sequence.priority] += 1
        output = np.array(sequence.output, np.int64)
        step.admit.append(Admission(sequence.seq_id, sequence.prompt, sequence.sampling, output))
        self._add_rows(step, sequence)
        return True

    def _changes(self) -> tuple[int, int]:
        """As long as this stays the same, what could not be admitted still cannot."""
        return self.queue.changes, self.allocator.releases

    # --- going out ---------------------------------------------------------------------------------------------

    def _make_way(self) -> bool:
        """Preempt for a waiting sequence of a better priority; False: the step in flight must be collected first."""
        while (best := self.queue.best_priority()) is not None and best < max(self._priorities, default=best):
            head = self.queue.first()
            assert head is not None
            if head.seq_id in self._releases or (
                len(self.running) < self.limits.max_sequences and self.states.fits(head, self.running)
            ):
                break
            victim = self._victim()
            if self.queue.urgency(victim, self.clock()) <= head.priority:
                break
            if self.decoding.pending():
                return False
            self._preempt(victim)
        return True

    def _reserve(self) -> bool:
        """Blocks for the next row of every decoding sequence; False: the step in flight must be collected first.

        Preempting, and starting over with the other rotary table, need every drawn token to be known.
        """
        decoding = self.decoding
        while True:
            places = decoding.ready(self.limits.max_sequences)
            tokens = decoding.starts[places] + 1
            if self.limits.rope_switch is not None:
                crossing = (decoding.rope_lens[places] <= self.limits.rope_switch) & (tokens > self.limits.rope_switch)
                for seq_id in decoding.ids[places[crossing]].tolist():
                    if decoding.pending():
                        return False
                    self._start_over(self.running[seq_id])
                if crossing.any():
                    continue
            lacking = self.allocator.lacking(places, tokens)
            wanted = zip(decoding.ids[places[lacking]].tolist(), tokens[lacking].tolist())
            if all(self.allocator.extend(seq_id, count) for seq_id, count in wanted):
                return True
            if decoding.pending():
                return False
            self._preempt(self._victim())

    def _start_over(self, sequence: Sequence) -> None:
        """Compute a sequence again, with the rotary table its length now asks for."""
        self.decoding.leave(sequence)
        self.states.let_go(sequence)
        others = self.running.keys() - {sequence.seq_id}
        if self.states.bring_in(sequence, others):
            self.prefilling[sequence.seq_id] = sequence
        else:
            self._wait_again(sequence)

    def _in_order(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """The most urgent first."""
        now = self.clock()
        return sorted(sequences, key=lambda s: (self.queue.urgency(s, now), s.order))

    def _victim(self) -> Sequence:
        """The running sequence that is least urgent."""
        return self._in_order(self.running.values())[-1]

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; all its tokens are known."""
        if self.prefilling.pop(sequence.seq_id, None) is None:
            self.decoding.leave(sequence)
        self.states.move_out(sequence)
        self._counted.swaps += bool(sequence.swapped)
        self._counted.recomputes += not sequence.swapped
        self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        self._leave_running(sequence)
        if not sequence.swapped:
            sequence.computed = 0
        sequence.awaits = None
        self.queue.push(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """A running sequence has ended."""
        if self.prefilling.pop(sequence.seq_id, None) is None:
            self.decoding.leave(sequence)
        self.states.let_go(sequence)
        self._leave_running(sequence)

    def _leave_running(self, sequence: Sequence) -> None:
        del self.running[sequence.seq_id]
        self._releases.append(sequence.seq_id)
        self._priorities[sequence.priority] -= 1
        if not self._priorities[sequence.priority]:
            del self._priorities[sequence.priority]
