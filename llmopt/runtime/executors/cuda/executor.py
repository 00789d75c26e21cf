"""The cuda executor: steps through planned buckets on a device, sampling on the host."""

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
from llmopt.runtime.protocol import ExecutorLimits, FloatArray, IntArray, Sampled, StateOp, StepBatch, StepOutput
from llmopt.runtime.sampler import HostSampler


class Backend(Protocol):
    """What runs a bucket: the GPU, or in tests an interpreter. ``blocks``: blocks allocated by state group."""

    blocks: Mapping[str, int]

    def run(self, bucket: int, inputs: Arrays, rows: int) -> int:
        """Enqueue a bucket with its inputs (block tables unpadded) and the download of ``rows`` rows of logits."""
        ...

    def logits(self, handle: int) -> FloatArray:
        """Wait for a run; its logits (rows, V) float32."""
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
class _Pending:
    """A submitted step: its runs, and for each the rows and where their logits are."""

    batch: StepBatch
    runs: list[tuple[int, Part, list[IntArray]]] = field(default_factory=list)


class CudaExecutor:
    """Executor protocol over a backend. Raises ExecutorError from every call once the device has failed."""

    def __init__(self, program: Program, plan: LaunchPlan, backend: Backend, sequences: int, context: int) -> None:
        self.program, self.plan, self.backend = program, plan, backend
        self.state_plan = program.states
        self.buckets = Buckets(plan)
        self.limits = ExecutorLimits(
            max_context=context,
            max_sequences=min(sequences, self.buckets.max_parts),
            max_tokens_per_step=self.buckets.max_rows,
            blocks=dict(backend.blocks),
            vocab_size=program.vocab_size,
            rope_switch=program.rope_switch,
        )
        self.sampler = HostSampler(program.vocab_size)
        self.swapped: dict[tuple[str, int], list[npt.NDArray[np.uint8]]] = {}
        self.pending: dict[int, _Pending] = {}
        self.dead: ExecutorError | None = None
        self.tickets = 0

    def submit(self, batch: StepBatch) -> int:
        """Enqueue a step on the device and return at once."""
        self._alive()
        for admission in batch.admit:
            self.sampler.admit(admission)
        step = _Pending(batch)
        try:
            for op in batch.ops:
                self._state_op(op)
            for part in self.buckets.parts(batch.rows) if batch.rows else ():
                step.runs.append(self._start(part))
        except ExecutorError as error:
            self.dead = error
            raise
        self.tickets += 1
        self.pending[self.tickets] = step
        return self.tickets

    def collect(self, ticket: int) -> StepOutput:
        """Wait for a step and draw its tokens; raises ExecutorError when the device failed or the ticket is unknown."""
        self._alive()
        if ticket not in self.pending:
            raise ExecutorError(f"step {ticket} was never submitted or was already collected")
        step = self.pending.pop(ticket)
        try:
            logits, ends = self._logits(step)
            drawn = list(ends)
            rows = np.stack([ends[seq_id] for seq_id in drawn]) if drawn else np.zeros((0, 0), np.float32)
            sampled = self.sampler.sample_rows(drawn, rows, step.batch.masks) if drawn else []
        except ExecutorError as error:
            self.dead = error
            raise
        for seq_id in step.batch.release:
            self.sampler.release(seq_id)
        results: dict[int, Sampled] = dict(zip(drawn, sampled))
        return StepOutput(results, {seq_id: np.concatenate(parts) for seq_id, parts in logits.items()})

    def close(self) -> None:
        """Free the device's memory; idempotent."""
        self.pending.clear()
        self.backend.close()

    def _alive(self) -> None:
        if self.dead is not None:
            raise ExecutorError(f"the engine is dead: {self.dead}")

    def _start(self, part: Part) -> tuple[int, Part, list[IntArray]]:
        dims = self.plan.buckets[part.bucket].dims
        inputs, wanted = padded_inputs(part, dims, self.plan.inputs, self.state_plan, self.sampler.last)
        rows = 1 + max((int(index.max()) for index in wanted if len(index)), default=-1)
        return self.backend.run(part.bucket, inputs, rows), part, wanted

    def _logits(self, step: _Pending) -> tuple[dict[int, list[FloatArray]], dict[int, FloatArray]]:
        """Logits asked for, and the last row of each sequence that draws."""
        asked: dict[int, list[FloatArray]] = {}
        ends: dict[int, FloatArray] = {}
        for handle, part, wanted in step.runs:
            found = self.backend.logits(handle)
            for row, index in zip(part.rows, wanted):
                if row.logits != "none":
                    asked.setdefault(row.seq_id, []).append(found[index])
                if row.sample:
                    ends[row.seq_id] = found[index[-1]]
        return asked, ends

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
