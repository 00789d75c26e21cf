"""The cuda executor: steps through planned buckets on a device; greedy tokens are drawn there, others on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmopt.errors import ExecutorError, RequestError
from llmopt.launch import LaunchPlan
from llmopt.program import Program, StateGroup
from llmopt.runtime.executors.cuda.steps import Arrays, Buckets, Part, padded_inputs
from llmopt.runtime.protocol import (
    Admission,
    ExecutorLimits,
    FloatArray,
    IntArray,
    Sampled,
    StateOp,
    StepBatch,
    StepOutput,
)
from llmopt.runtime.sampler import HostSampler

PLACES = 3
"""Places for last tokens a sequence: a step that admits as many as it releases, while the step before it, which did
the same, is still on its way."""


class Backend(Protocol):
    """What runs a bucket: the GPU, or in tests an interpreter. ``blocks``: blocks allocated by state group."""

    blocks: Mapping[str, int]

    def run(self, bucket: int, inputs: Arrays, draw: bool, rows: int) -> int:
        """Enqueue a bucket with its inputs (block tables unpadded), drawing tokens if any row wants one, and the
        download of what was drawn and of ``rows`` rows of logits. Returns a handle."""
        ...

    def result(self, handle: int) -> tuple[IntArray, FloatArray]:
        """Wait for a run, once: its drawn tokens (M,), and its logits (rows, V) float32."""
        ...

    def copy_blocks(self, group: StateGroup, source: IntArray, target: IntArray) -> None:
        """Copy blocks of every state of a group."""
        ...

    def read_blocks(self, group: StateGroup, blocks: IntArray) -> list[npt.NDArray[np.uint8]]:
        """Blocks of every state of a group, on the host."""
        ...

    def write_blocks(self, group: StateGroup, blocks: IntArray, data: list[npt.NDArray[np.uint8]]) -> None:
        """Inverse of read_blocks."""
        ...

    def close(self) -> None:
        """Free the device's memory."""
        ...


@dataclass
class _Run:
    """A part on its way: its handle, the logits rows of each of its rows, and the sequences drawn on the device."""

    handle: int
    part: Part
    wanted: list[IntArray]
    drawn: frozenset[int]


@dataclass
class _Step:
    """A submitted step; ``output`` once it has been waited for."""

    batch: StepBatch
    runs: list[_Run] = field(default_factory=list)
    output: StepOutput | None = None


class CudaExecutor:
    """Executor protocol over a backend. Raises ExecutorError from every call once the device has failed."""

    def __init__(self, program: Program, plan: LaunchPlan, backend: Backend, sequences: int, context: int) -> None:
        self.program, self.plan, self.backend = program, plan, backend
        self.state_plan = program.states
        self.buckets = Buckets(plan)
        places = plan.persistent["last_tokens"].shape[0]
        self.limits = ExecutorLimits(
            max_context=context,
            max_sequences=min(sequences, self.buckets.max_parts, places // PLACES),
            max_tokens_per_step=self.buckets.max_rows,
            blocks=dict(backend.blocks),
            vocab_size=program.vocab_size,
            rope_switch=program.rope_switch,
            steps_in_flight=2,
        )
        self.sampler = HostSampler(program.vocab_size)
        self.free = list(range(places))[::-1]
        self.slots: dict[int, int] = {}
        self.on_device: set[int] = set()
        self.swapped: dict[tuple[str, int], list[npt.NDArray[np.uint8]]] = {}
        self.steps: dict[int, _Step] = {}
        self.dead: ExecutorError | None = None
        self.tickets = 0

    def submit(self, batch: StepBatch) -> int:
        """Enqueue a step and return at once, unless it needs a token that the host is still to draw, or a sequence
        comes back whose release is on its way."""
        self._alive()
        step = _Step(batch)
        try:
            waits = any(row.tokens is None and row.seq_id not in self.on_device for row in batch.rows)
            if waits or any(admission.seq_id in self.slots for admission in batch.admit):
                self._catch_up()
            for admission in batch.admit:
                self._admit(admission)
            for op in batch.ops:
                self._state_op(op)
            for part in self.buckets.parts(batch.rows) if batch.rows else ():
                step.runs.append(self._start(part, batch))
        except ExecutorError as error:
            self.dead = error
            raise
        self.tickets += 1
        self.steps[self.tickets] = step
        return self.tickets

    def collect(self, ticket: int) -> StepOutput:
        """Wait for a step and the steps before it; raises ExecutorError when the device failed or the ticket is
        unknown."""
        self._alive()
        if ticket not in self.steps:
            raise ExecutorError(f"step {ticket} was never submitted or was already collected")
        self._catch_up(ticket)
        output = self.steps.pop(ticket).output
        assert output is not None
        return output

    def close(self) -> None:
        """Free the device's memory; idempotent."""
        self.steps.clear()
        self.backend.close()

    def _alive(self) -> None:
        if self.dead is not None:
            raise ExecutorError(f"the engine is dead: {self.dead}")

    def _admit(self, admission: Admission) -> None:
        self.sampler.admit(admission)
        self.on_device.discard(admission.seq_id)
        if admission.seq_id not in self.slots:
            if not self.free:
                raise RequestError(f"more than {len(self.slots)} sequences at once")
            self.slots[admission.seq_id] = self.free.pop()

    def _release(self, seq_id: int) -> None:
        self.sampler.release(seq_id)
        self.on_device.discard(seq_id)
        self.free.append(self.slots.pop(seq_id))

    def _start(self, part: Part, batch: StepBatch) -> _Run:
        bucket = self.plan.buckets[part.bucket]
        drawing = [r.seq_id for r in part.rows if r.sample]
        ours = frozenset(i for i in drawing if self.sampler.greedy(i) and i not in batch.masks)
        slots = {i: self.slots[i] for i in ours}
        inputs, wanted = padded_inputs(part, bucket, self.state_plan, self._last, slots)
        asked = [i for r, i in zip(part.rows, wanted) if r.logits != "none" or (r.sample and r.seq_id not in ours)]
        rows = 1 + max((int(index.max()) for index in asked if len(index)), default=-1)
        handle = self.backend.run(part.bucket, inputs, bool(ours), rows)
        self.on_device.difference_update(drawing)
        self.on_device.update(ours)
        return _Run(handle, part, wanted, ours)

    def _last(self, seq_id: int) -> int:
        """A sequence's last token; below zero the place where the device keeps it."""
        return -1 - self.slots[seq_id] if seq_id in self.on_device else self.sampler.last(seq_id)

    def _catch_up(self, ticket: int | None = None) -> None:
        """Wait for every step, or for those up to a ticket."""
        for number in sorted(self.steps):
            if ticket is not None and number > ticket:
                return
            step = self.steps[number]
            if step.output is None:
                try:
                    step.output = self._finish(step)
                except ExecutorError as error:
                    self.dead = error
                    raise

    def _finish(self, step: _Step) -> StepOutput:
        sampled: dict[int, Sampled] = {}
        asked: dict[int, list[FloatArray]] = {}
        ends: dict[int, FloatArray] = {}
        for run in step.runs:
            tokens, logits = self.backend.result(run.handle)
            for row, index in zip(run.part.rows, run.wanted):
                if row.logits != "none":
                    asked.setdefault(row.seq_id, []).append(logits[index])
                if row.sample and row.seq_id in run.drawn:
                    sampled[row.seq_id] = self._accept(row.seq_id, int(tokens[index[-1]]))
                elif row.sample:
                    ends[row.seq_id] = logits[index[-1]]
        if ends:
            found = self.sampler.sample_rows(list(ends), np.stack(list(ends.values())), step.batch.masks)
            sampled |= dict(zip(ends, found))
        for seq_id in step.batch.release:
            self._release(seq_id)
        return StepOutput(sampled, {seq_id: np.concatenate(parts) for seq_id, parts in asked.items()})

    def _accept(self, seq_id: int, token: int) -> Sampled:
        if token < 0:
            raise ExecutorError("the model produced logits that are not finite")
        self.sampler.accept(seq_id, token)
        return Sampled(token)

    def _state_op(self, op: StateOp) -> None:
        group = next((g for g in self.state_plan.groups if g.name == op.group), None)
        if group is None:
            raise RequestError(f"no state group {op.group}")
        match op.kind:
            case "copy" | "move":
                self.backend.copy_blocks(group, op.source, op.target)
            case "swap_out":
                self.swapped[op.group, op.key] = self.backend.read_blocks(group, op.source)
            case "swap_in":
                self.backend.write_blocks(group, op.target, self.swapped.pop((op.group, op.key)))
            case "truncate":
                pass  # positions past the new length are masked by seq_lens and overwritten by the next rows
