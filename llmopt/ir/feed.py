"""Feeds one sequence to a module's function, whatever inputs its passes have added so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmopt.ir.interpret import JointObserver, Observer, alone, run_together
from llmopt.ir.module import Module
from llmopt.ir.samples import CPU
from llmopt.program import StateGroup


def run_sequence(
    module: Module,
    function: str,
    tokens: Sequence[int],
    chunks: Sequence[int] | None = None,
    observe: Observer | None = None,
    device: torch.device = CPU,
) -> Tensor:
    """Logits (len(tokens), V) of one sequence, as ``run_sequences`` gives them."""
    return run_sequences(module, function, [tokens], chunks, observe and alone(observe), device)[0]


def run_sequences(
    module: Module,
    function: str,
    sequences: Sequence[Sequence[int]],
    chunks: Sequence[int] | None = None,
    observe: JointObserver | None = None,
    device: torch.device = CPU,
) -> list[Tensor]:
    """Logits (T, V) of each of some sequences of T tokens, computed on ``device`` side by side, weights read once for
    all, in steps of ``chunks`` rows (default: one step).

    States start as NaN (int8 ones as -128, which no row is written as) and live in blocks handed out in reverse
    order, so that reading an unwritten slot or ignoring the block table shows. A module without states can only take
    one step.
    """
    feeds = [Feed(module, function, len(tokens), device) for tokens in sequences]
    logits: list[list[Tensor]] = [[] for _ in sequences]
    position = 0
    for length in chunks or (len(sequences[0]),):
        rows = slice(position, position + length)
        given = [feed.given(torch.tensor([tokens[rows]]), position) for feed, tokens in zip(feeds, sequences)]
        for feed, found, outputs in zip(feeds, logits, run_together(module, function, given, observe)):
            found.append(outputs[0][0])
            feed.keep(outputs)
        position += length
    return [torch.cat(found) for found in logits]


def limit_chunk(module: Module, length: int) -> int:
    """``length`` rows, or as many as the module's rings take in one step."""
    limits = [g.max_chunk() for g in module.states]
    return min([length, *(m for m in limits if m is not None)])


class Feed:
    """The inputs of one sequence and its states between steps."""

    def __init__(self, module: Module, function: str, length: int, device: torch.device) -> None:
        self.module, self.function, self.length, self.device = module, function, length, device
        self.inputs = {n.name: n for n in module.functions[function].graph.nodes if n.op == "placeholder"}
        self.blocks = {g.name: torch.arange(g.blocks_for(length)).flip(0) for g in module.states}
        self.states = {spec.input: self._empty(g, spec.input) for g in module.states for spec in g.states}

    def _empty(self, group: StateGroup, name: str) -> Tensor:
        value = self.inputs[name].meta["val"]
        shape = (len(self.blocks[group.name]), *(int(d) for d in value.shape[1:]))
        return poisoned(shape, value.dtype)

    def given(self, tokens: Tensor, start: int) -> dict[str, Tensor]:
        """Inputs of a step over the rows ``tokens`` (1, T) at positions start, start + 1, …"""
        rows = tokens.shape[1]
        positions = torch.arange(start, start + rows)
        values = {
            "input_ids": tokens,
            "position_ids": positions[None],
            "cu_seqlens": torch.tensor([0, rows], dtype=torch.int32),
            "seq_lens": torch.tensor([start + rows], dtype=torch.int32),
            # of the whole sequence: longrope's choice of table must not depend on how the steps are cut
            "rope_lens": torch.full((1, rows), self.length),
            "logit_rows": torch.arange(rows),
            **self.states,
        }
        for group in self.module.states:
            values[f"block_table_{group.name}"] = self.blocks[group.name][None].int()
            values[f"slot_mapping_{group.name}"] = slots(group, self.blocks[group.name], positions)
        return {name: values[name].to(self.device) for name in self.inputs if name in values}

    def keep(self, outputs: Sequence[Tensor]) -> None:
        """A step's states, for the next one."""
        self.states = {name: outputs[index] for name, index in self.module.state_outputs.items()}


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty state: NaN, or in a dtype without NaN the least number, which no code is."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype)


def slots(group: StateGroup, blocks: Tensor, positions: Tensor) -> Tensor:
    """Flat slot of each position of a sequence, as StateGroup says."""
    if group.kind == "ring":
        wrapped = group.sinks + (positions - group.sinks) % (group.block_size - group.sinks)
        return blocks[0] * group.block_size + torch.where(positions < group.sinks, positions, wrapped)
    return blocks[positions // group.block_size] * group.block_size + positions % group.block_size
