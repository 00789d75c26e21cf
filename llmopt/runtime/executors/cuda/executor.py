"""The cuda executor: steps through planned buckets on a device, which draws the tokens and feeds them back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmopt.errors import ExecutorError, RequestError
from llmopt.launch import LaunchPlan
from llmopt.program import Program
from llmopt.runtime.executors.cuda.backend import Backend, Draw, Result, Tail
from llmopt.runtime.executors.cuda.drawing import is_greedy, place_rows, reported
from llmopt.runtime.executors.cuda.steps import Buckets, Drawing, Part, drawing, drawing_inputs, padded_inputs
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

PLACES = 2
"""Places a sequence: a step may admit as many sequences as it releases."""

NOT_FINITE = -1
"""What the device draws from logits that are not finite; from none that are allowed it draws NO_TOKEN."""


@dataclass
class _Sequence:
    """A sequence on the device: its place, whether it takes nothing but largest logits, how many alternatives it
    reports (None: no report), its last token while the host alone has it."""

    place: int
    greedy: bool
    reports: int | None
    last: int | None


@dataclass
class _Run:
    """A part on its way: its handle, the logits rows of each of its rows, what it draws, and who reports how many
    alternatives."""

    handle: int
    part: Part
    wanted: list[IntArray]
    drawing: Drawing
    reports: dict[int, int]


@dataclass
class _Step:
    """A submitted step; ``output`` once it has been waited for."""

    runs: list[_Run] = field(default_factory=list)
    output: StepOutput | None = None


class CudaExecutor:
    """Executor protocol over a backend. Raises ExecutorError from every call once the device has failed."""

    def __init__(self, program: Program, plan: LaunchPlan, backend: Backend, sequences: int, context: int) -> None:
        self.program, self.plan, self.backend = program, plan, backend
        self.state_plan = program.states
        self.buckets = Buckets(plan)
        places, self.vocabulary = plan.persistent["history"].shape
        self.limits = ExecutorLimits(
            max_context=context,
            max_sequences=min(sequences, self.buckets.max_parts, places // PLACES),
            max_tokens_per_step=self.buckets.max_rows,
            blocks=dict(backend.blocks),
            vocab_size=program.vocab_size,
            rope_switch=program.rope_switch,
            steps_in_flight=2,
            row_buckets=self.buckets.extend_rows,
        )
        self.free = list(range(PLACES * self.limits.max_sequences))[::-1]
        self.sequences: dict[int, _Sequence] = {}
        self.plain: set[int] = set()
        self.swapped: dict[tuple[str, int], list[npt.NDArray[np.uint8]]] = {}
        self.steps: dict[int, _Step] = {}
        self.dead: ExecutorError | None = None
        self.tickets = 0

    def submit(self, batch: StepBatch) -> int:
        """Enqueue a step and return. Masks are read when the forward pass is on its way; only they are waited for."""
        self._alive()
        step = _Step()
        try:
            for admission in batch.admit:
                self._admit(admission)
            for op in batch.ops:
                self._state_op(op)
            for part in self._parts(batch):
                step.runs.append(self._start(part, batch))
        except ExecutorError as error:
            self.dead = error
            raise
        for seq_id in batch.release:
            # The device works in order: who gets the place next writes to it after this step's rows.
            self.free.append(self.sequences.pop(seq_id).place)
        self.tickets += 1
        self.steps[self.tickets] = step
        return self.tickets

    def collect(self, ticket: int) -> StepOutput:
        """Wait for a step and the steps before it. Raises ExecutorError when the device failed or the ticket is
        unknown."""
        self._alive()
        if ticket not in self.steps:
            raise ExecutorError(f"step {ticket} was never submitted or was already collected")
        for number in sorted(self.steps):
            if number <= ticket and self.steps[number].output is None:
                try:
                    self._finish(self.steps[number])
                except ExecutorError as error:
                    self.dead = error
                    raise
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
        """Give a sequence a place, and the device what it needs to draw: parameters, counts of tokens so far."""
        rows = place_rows(admission, self.vocabulary)
        known = self.sequences.get(admission.seq_id)
        if known is None and not self.free:
            raise RequestError(f"more than {len(self.sequences)} sequences at once")
        place = known.place if known else self.free.pop()
        last = admission.output if len(admission.output) else admission.prompt
        greedy = is_greedy(admission.sampling)
        self.sequences[admission.seq_id] = _Sequence(place, greedy, admission.sampling.logprobs, int(last[-1]))
        if not (greedy and place in self.plain):
            self.backend.keep(place, rows)
        (self.plain.add if greedy else self.plain.discard)(place)

    def _parts(self, batch: StepBatch) -> Iterable[Part]:
        """The step's rows by bucket; plain decode rows stay arrays when nothing else is in the step."""
        if batch.decode is not None and not batch.rows:
            return self.buckets.decode_parts(batch.decode)
        rows = batch.all_rows(self.state_plan)
        return self.buckets.parts(rows) if rows else ()

    def _start(self, part: Part, batch: StepBatch) -> _Run:
        """Enqueue a part's forward pass, then, with its masks, what follows."""
        bucket = self.plan.buckets[part.bucket]
        inputs, wanted = padded_inputs(part, bucket, self.state_plan, self._last)
        drawn = drawing(part, wanted)
        sequences = [self.sequences[seq_id] for seq_id in drawn.seq_ids]
        masked = [seq_id for seq_id in drawn.seq_ids if seq_id in batch.masks] if batch.masks else []
        places = np.array([sequence.place for sequence in sequences], np.int64)
        handle = self.backend.forward(part.bucket, inputs | drawing_inputs(drawn, places, masked, bucket.dims["M"]))
        reports = {i: s.reports for i, s in zip(drawn.seq_ids, sequences) if s.reports is not None}
        asked = [index for row, index in zip(part.rows, wanted) if row.logits != "none"]
        draw: Draw = "full"
        if not masked and all(sequence.greedy for sequence in sequences):
            draw = "greedy" if sequences else "nothing"
        logits = np.concatenate([np.zeros(0, np.int64), *asked])
        self.backend.finish(handle, Tail(draw, self._masks(batch, masked), bool(reports), logits))
        for sequence in sequences:
            sequence.last = None
        return _Run(handle, part, wanted, drawn, reports)

    def _masks(self, batch: StepBatch, masked: list[int]) -> npt.NDArray[np.uint32]:
        """Masks (n, ceil(V/32)) of sequences; reading one may wait for it."""
        masks = np.zeros((len(masked), -(-self.vocabulary // 32)), np.uint32)
        for target, seq_id in zip(masks, masked):
            mask = batch.masks[seq_id]
            target[: len(mask)] = mask
        return masks

    def _last(self, seq_id: int) -> int:
        """A sequence's last token; below zero the place where the device keeps it."""
        sequence = self.sequences[seq_id]
        return -1 - sequence.place if sequence.last is None else sequence.last

    def _finish(self, step: _Step) -> None:
        sampled: dict[int, Sampled] = {}
        asked: dict[int, list[FloatArray]] = {}
        plain: list[IntArray] = []
        for run in step.runs:
            result = self.backend.result(run.handle)
            at = 0
            for row, index in zip(run.part.rows, run.wanted):
                if row.logits != "none":
                    asked.setdefault(row.seq_id, []).append(result.logits[at : at + len(index)])
                    at += len(index)
            tokens = result.tokens[run.drawing.rows] if run.drawing.seq_ids else np.zeros(0, np.int64)
            if (tokens == NOT_FINITE).any():
                raise ExecutorError("the model produced logits that are not finite")
            if run.part.decode is None:
                sampled |= {i: Sampled(token) for i, token in zip(run.drawing.seq_ids, tokens.tolist())}
            else:
                plain.append(tokens)
            if run.reports:
                sampled |= self._reported(run, result)
        logits = {seq_id: np.concatenate(parts) for seq_id, parts in asked.items()}
        step.output = StepOutput(sampled, logits, np.concatenate(plain) if plain else None)

    def _reported(self, run: _Run, result: Result) -> dict[int, Sampled]:
        """Tokens with log-probabilities, of the sequences that ask."""
        return {
            seq_id: reported(int(result.tokens[row]), result.reports[row], run.reports[seq_id], self.vocabulary)
            for seq_id, row in zip(run.drawing.seq_ids, run.drawing.rows.tolist())
            if seq_id in run.reports
        }

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
            case "swap_drop":
                self.swapped.pop((op.group, op.key), None)
            case "truncate":
                pass  # positions past the new length are masked by seq_lens and overwritten by the next rows
