"""The reference executor: the step protocol over the interpreter (development only: it needs torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llmopt.artifact import Artifact
from llmopt.errors import ExecutorError
from llmopt.ir.feed import poisoned
from llmopt.lower.readers import to_torch
from llmopt.program import Program, StateGroup
from llmopt.runtime.protocol import ExecutorLimits, StateOp, StepBatch, StepOutput
from llmopt.runtime.ragged import ragged_inputs
from llmopt.runtime.sampler import HostSampler
from llmopt.target import LoadOptions

from .interpreter import Interpreter, bind_dims

MAX_TOKENS_PER_STEP = 2048


class ReferenceExecutor:
    """Runs steps at submit; empty states are poisoned, so that reading an unwritten slot shows."""

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor], options: LoadOptions) -> None:
        self.program, self.device = program, torch.device(options.device)
        self.function = program.functions[program.entry_points["extend"]]
        self.state_plan = program.states
        self.weights = {name: w.to(self.device) for name, w in weights.items()}
        self.interpreter = Interpreter(self.function, self.weights, self.device)
        context = min(options.max_context or program.max_context, program.max_context)
        blocks = {g.name: g.blocks_for(context) * options.max_sequences for g in program.states.groups}
        self.states = {
            spec.input: self._empty(group, spec.input, blocks[group.name])
            for group in program.states.groups
            for spec in group.states
        }
        self.limits = ExecutorLimits(
            context, options.max_sequences, MAX_TOKENS_PER_STEP, blocks, program.vocab_size, program.rope_switch
        )
        self.sampler = HostSampler(program.vocab_size)
        self.swapped: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.done: dict[int, StepOutput] = {}
        self.tickets = 0

    def _empty(self, group: StateGroup, name: str, blocks: int) -> torch.Tensor:
        shape = self.function.types[name].shape
        dtype = getattr(torch, self.function.types[name].dtype)
        return poisoned((blocks, *map(int, shape[1:])), dtype).to(self.device)

    def submit(self, batch: StepBatch) -> int:
        """Run the step now; the result waits for collect."""
        for admission in batch.admit:
            self.sampler.admit(admission)
        for op in batch.ops:
            self._state_op(op)
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
        """Drop states and weights."""
        self.states.clear()
        self.weights.clear()

    @torch.no_grad()
    def _run(self, batch: StepBatch) -> StepOutput:
        rows = batch.all_rows(self.state_plan)
        if not rows:
            return StepOutput({})
        if any(row.tree is not None for row in rows):
            raise ExecutorError("this program has no tree attention")
        arrays, wanted = ragged_inputs(batch, self.state_plan, self.sampler.last)
        inputs = {n: torch.from_numpy(arrays[n]).to(self.device) for n in self.function.inputs if n in arrays}
        inputs |= self.states
        logits = self.interpreter(inputs, bind_dims(self.function, inputs))[0][0].float().cpu().numpy()
        if "logit_rows" not in self.function.inputs:
            logits = logits[arrays["logit_rows"]]
        drawn = [(row.seq_id, index[-1]) for row, index in zip(rows, wanted) if row.sample]
        ids = [seq_id for seq_id, _ in drawn]
        sampled = self.sampler.sample_rows(ids, logits[[i for _, i in drawn]], batch.masks) if drawn else []
        asked = {row.seq_id: logits[index] for row, index in zip(rows, wanted) if row.logits != "none"}
        return StepOutput(dict(zip(ids, sampled)), asked)

    def _state_op(self, op: StateOp) -> None:
        group = next(g for g in self.state_plan.groups if g.name == op.group)
        states = [self.states[spec.input] for spec in group.states]
        match op.kind:
            case "copy" | "move":
                for state in states:
                    state[torch.from_numpy(op.target)] = state[torch.from_numpy(op.source)]
            case "swap_out":
                self.swapped[op.group, op.key] = [s[torch.from_numpy(op.source)].cpu() for s in states]
            case "swap_in":
                for state, saved in zip(states, self.swapped.pop((op.group, op.key))):
                    state[torch.from_numpy(op.target)] = saved.to(self.device)
            case "swap_drop":
                self.swapped.pop((op.group, op.key), None)
            case "truncate":
                pass  # positions past the new length are masked by seq_lens and overwritten by the next rows


def load(artifact: Artifact, options: LoadOptions) -> ReferenceExecutor:
    """The executor of an artifact built for the reference target."""
    store = artifact.weight_store()
    weights: dict[str, Any] = {name: to_torch(np.asarray(store.get(name))) for name in artifact.program.weights}
    return ReferenceExecutor(artifact.program, weights, options)
