"""The onnxruntime executor: one model, slots of KV state shared as past and present, sampling on the host."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmopt.errors import ExecutorError
from llmopt.program import Program
from llmopt.runtime.executors.onnxruntime_calls import Call, calls_of
from llmopt.runtime.executors.onnxruntime_logits import LogitRows
from llmopt.runtime.executors.onnxruntime_session import (
    StepContext,
    activations,
    open_session,
    rotary_tables,
    runs_here,
)
from llmopt.runtime.executors.onnxruntime_state import SlotStates
from llmopt.runtime.golden import check_golden
from llmopt.runtime.protocol import ExecutorLimits, FloatArray, StepBatch, StepOutput
from llmopt.runtime.ragged import logit_rows
from llmopt.runtime.sampler import HostSampler
from llmopt.target import LoadOptions, WeightStore

if TYPE_CHECKING:
    from llmopt.artifact import Artifact

log = logging.getLogger("llmopt.onnxruntime")

MODEL_FILE, COPY_FILE = "model.onnx", "copy.onnx"
NATIVE_MODEL_FILE, NATIVE_LIBRARY_FILE = "native.onnx", "native-x86_64-linux.so"
PLAIN_MODEL_FILE = "plain.onnx"
MAX_TOKENS_PER_STEP = 512
"""Attention scores of a chunk take heads x chunk x context x 4 bytes; beyond ~128 rows the products gain nothing."""


class OnnxruntimeExecutor:
    """Runs steps at submit: one call for all one-row sequences, one for each prefill chunk.

    ``model`` and ``copier`` are the bytes of the model (native.onnx comes with its ``library``) and of copy.onnx;
    ``options.device`` is ``cpu`` or ``cuda`` (``cuda:1``). Raises ResourceError when the provider, or memory for one
    slot, is missing.
    """

    def __init__(
        self,
        program: Program,
        model: bytes,
        copier: bytes,
        weights: WeightStore,
        options: LoadOptions,
        library: Path | None = None,
    ) -> None:
        self.program, self.state_plan = program, program.states
        group = program.states.groups[0]
        context = min(options.max_context or program.max_context, program.max_context)
        self.session = open_session(model, weights, options, library)
        self.states = SlotStates(group, context, copier, options)
        tables = rotary_tables(self.session, self.states.capacity)
        sequences = min(options.max_sequences, self.states.slots)
        self.logits = LogitRows(int(self.session.get_outputs()[0].shape[-1]), 2 * sequences)
        self.context = StepContext(self.session, self.states, tables, self.logits)
        self.limits = ExecutorLimits(
            max_context=context,
            max_sequences=sequences,
            max_tokens_per_step=MAX_TOKENS_PER_STEP,
            blocks={group.name: self.states.slots},
            vocab_size=program.vocab_size,
            rope_switch=program.rope_switch,
            spare_core=spares_core(options),
            ranged=True,
        )
        self.sampler = HostSampler(program.vocab_size)
        self.done: dict[int, StepOutput] = {}
        self.tickets = 0

    def submit(self, batch: StepBatch) -> int:
        """Run the step now; the result waits for collect."""
        for admission in batch.admit:
            self.sampler.admit(admission)
        for op in batch.ops:
            self.states.apply(op)
        self.tickets += 1
        self.done[self.tickets] = self._run(batch)
        for seq_id in batch.release:
            self.sampler.release(seq_id)
        return self.tickets

    def collect(self, ticket: int) -> StepOutput:
        """The outputs of a submitted step; raises ExecutorError for an unknown ticket."""
        if ticket not in self.done:
            raise ExecutorError(f"step {ticket} was never submitted or was already collected")
        return self.done.pop(ticket)

    def close(self) -> None:
        """Drop the session, its weights and the states."""
        self.states.close()
        self.__dict__.pop("context", None)
        self.__dict__.pop("session", None)

    def _run(self, batch: StepBatch) -> StepOutput:
        rows = batch.all_rows(self.state_plan)
        slots = [int(row.blocks[self.states.group.name][0]) for row in rows]
        logits: dict[int, FloatArray] = {}
        self.logits.begin()
        for call in calls_of(rows, slots, self.states, self.sampler.last):
            logits |= self._call(call)
        sampling = {row.seq_id for row in rows if row.sample}
        drawn = [seq_id for seq_id in logits if seq_id in sampling]  # in the order of their logits
        last = [logits[seq_id][-1] for seq_id in drawn]
        sampled = self.sampler.sample_rows(drawn, self.logits.together(last), batch.masks) if drawn else []
        asked = {row.seq_id: logits[row.seq_id].copy() for row in rows if row.logits != "none"}
        return StepOutput(dict(zip(drawn, sampled)), asked)

    def _call(self, call: Call) -> dict[int, FloatArray]:
        """Logits each sequence of the call needs, (rows, vocab)."""
        wanted = [logit_rows(row, start) for row, start in zip(call.rows, call.starts)]
        rows = np.concatenate(wanted)
        logits = self.context.run(call, rows)
        self.states.wrote(call.slots, call.ends)
        return split(logits, [row.seq_id for row in call.rows], [len(w) for w in wanted])


def spares_core(options: LoadOptions) -> bool:
    """Whether onnxruntime's threads, which spin while they wait, leave a core of this machine to others."""
    cores = os.cpu_count() or 1
    return cores > 1 if options.device != "cpu" else 0 < options.threads < cores


def split(logits: FloatArray, seq_ids: Sequence[int], counts: Sequence[int]) -> dict[int, FloatArray]:
    """Rows of the logits by sequence."""
    return dict(zip(seq_ids, np.split(logits, np.cumsum(counts)[:-1])))


def native_library(artifact: Artifact, options: LoadOptions) -> Path | None:
    """The artifact's library of CPU kernels; None where it has none, or, with a warning, where they cannot run."""
    if not artifact.has_file(NATIVE_LIBRARY_FILE) or options.device != "cpu":
        return None
    path = artifact.file(NATIVE_LIBRARY_FILE)
    if runs_here(path):
        return path
    log.warning("the artifact's CPU kernels need x86-64 Linux with AVX2 and FMA; onnxruntime's own run instead")
    return None


def model_file(has_file: Callable[[str], bool], device: str, library: Path | None) -> str:
    """Name of the form of the model for the device, of those there are (targets/onnxruntime/target.py says what each
    is for)."""
    if library is not None:
        return NATIVE_MODEL_FILE
    return PLAIN_MODEL_FILE if device != "cpu" and has_file(PLAIN_MODEL_FILE) else MODEL_FILE


def load(artifact: Artifact, options: LoadOptions) -> OnnxruntimeExecutor:
    """The executor of an artifact built for onnxruntime, checked against its golden tokens.

    Raises ExecutorError when the golden tokens come out differently: a provider can be wrong and deterministic.
    """
    library = native_library(artifact, options)
    name = model_file(artifact.has_file, options.device, library)
    model, copier = (artifact.file(n).read_bytes() for n in (name, COPY_FILE))
    executor = OnnxruntimeExecutor(artifact.program, model, copier, artifact.weight_store(), options, library)
    check_golden(executor, artifact.manifest.golden, dtype=activations(executor.session))
    return executor
