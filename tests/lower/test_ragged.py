"""A fully rewritten Llama, lowered: ragged steps of mixed prefill and decode equal plain attention per sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from llmopt.ir.feed import run_sequence, slots
from llmopt.ir.module import Module
from llmopt.ir.tolerance import row_error, tolerance
from llmopt.lower.lowering import lower
from llmopt.program import Program, StateGroup
from targets.reference.interpreter import Interpreter, bind_dims
from tests.ir.handmade import llama
from tests.passes.running import FUSIONS, run

WINDOWS = (0, 5, 7)
BOUND = tolerance(torch.float32, 64, depth=6)
LENGTHS = (19, 3, 11, 14)
STEPS = (
    {0: 4, 1: 3},
    {0: 1, 2: 6, 3: 2},
    {0: 6, 2: 1, 3: 5},
    {3: 1, 0: 1, 2: 4},
    {0: 7, 3: 6},
)
"""New rows of each sequence by step: prefill chunks and decodes in one batch, in changing order."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "paged": {"block_size": 4},
    "slots": {"layout": "slots"},
    "ring": {"layout": "ring", "max_chunk": 7, "block_size": 4},
    "ring, slots": {"layout": "ring", "max_chunk": 7, "full_layout": "slots"},
}


@dataclass
class Server:
    """The least that serves a program: block tables from a shuffled pool, states full of NaN."""

    program: Program
    weights: dict[str, torch.Tensor]
    done: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(len(LENGTHS)), 0))
    tamper: Callable[[dict[str, torch.Tensor]], None] = field(default=lambda inputs: None)

    def __post_init__(self) -> None:
        function = self.program.functions["step"]
        self.interpreter = Interpreter(function, self.weights)
        generator = torch.Generator().manual_seed(7)
        self.states, self.tables = {}, {}
        for group in self.program.states.groups:
            each = max(group.blocks_for(n) for n in LENGTHS)
            pool = torch.randperm(each * len(LENGTHS) + 3, generator=generator)
            self.tables[group.name] = [pool[i * each : (i + 1) * each] for i in range(len(LENGTHS))]
            for spec in group.states:
                shape = (len(pool), spec.heads, group.block_size, spec.head_dim)
                self.states[spec.input] = torch.full(shape, float("nan"))

    def step(self, rows: dict[int, int], tokens: list[list[int]]) -> dict[int, torch.Tensor]:
        """Logits of each sequence's new rows."""
        starts = [self.done[i] for i in rows]
        positions = [torch.arange(s, s + n) for s, n in zip(starts, rows.values())]
        inputs = {
            "input_ids": torch.tensor([[t for i, n in rows.items() for t in tokens[i][self.done[i] :][:n]]]),
            "position_ids": torch.cat(positions)[None],
            "cu_seqlens": torch.tensor([0, *rows.values()]).cumsum(0).int(),
            "seq_lens": torch.tensor([s + n for s, n in zip(starts, rows.values())]).int(),
            "logit_rows": torch.arange(sum(rows.values())),
        }
        for group in self.program.states.groups:
            inputs |= self.group_inputs(group, list(rows), positions)
        self.tamper(inputs)
        given = {n: v for n, v in {**inputs, **self.states}.items() if n in self.interpreter.function.inputs}
        logits = self.interpreter(given, bind_dims(self.interpreter.function, given))[0][0]
        for i, n in rows.items():
            self.done[i] += n
        return dict(zip(rows, logits.split(list(rows.values()))))

    def group_inputs(
        self, group: StateGroup, live: list[int], positions: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Block table and slot mapping of a group."""
        tables = [self.tables[group.name][i] for i in live]
        return {
            f"block_table_{group.name}": torch.stack(tables).int(),
            f"slot_mapping_{group.name}": torch.cat([slots(group, t, p) for t, p in zip(tables, positions)]),
        }


def rewritten(layout: str) -> Module:
    """Every pass that serves."""
    module = llama(3, WINDOWS)
    run(module, *FUSIONS, ("rewrite_kv_cache", LAYOUTS[layout]), "fuse_rope_kv_write", "prune_logits")
    return module


@cache
def lowered(layout: str) -> tuple[Program, dict[str, torch.Tensor]]:
    """The rewritten module's program and weights."""
    module = rewritten(layout)
    return lower(module), {n: w.tensor() for n, w in module.weights.items()}


@cache
def plain() -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens of each sequence, and their logits by plain attention."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(17, (n,), generator=generator).tolist() for n in LENGTHS]
    module = llama(3, WINDOWS)
    return tokens, [run_sequence(module, "step", t) for t in tokens]


def worst(layout: str, **options: Any) -> float:
    """Largest row error over the sequences."""
    tokens, expected = plain()
    server = Server(*lowered(layout), **options)
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(LENGTHS))}
    for rows in STEPS:
        for i, logits in server.step(rows, tokens).items():
            found[i].append(logits)
    assert list(server.done.values()) == list(LENGTHS)
    return max(row_error(torch.cat(found[i]), logits) for i, logits in enumerate(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_plain_attention(layout: str) -> None:
    assert worst(layout) < BOUND


def shift(inputs: dict[str, torch.Tensor]) -> None:
    """Positions of all but fresh rows one too far (a shift of all would cancel in rotary attention)."""
    inputs["position_ids"] += (inputs["position_ids"] > 4).long()


def swap_tables(inputs: dict[str, torch.Tensor]) -> None:
    for name, value in inputs.items():
        if name.startswith("block_table"):
            inputs[name] = value.flip(0)


def short(inputs: dict[str, torch.Tensor]) -> None:
    inputs["seq_lens"] -= (inputs["seq_lens"] > 8).int()


@pytest.mark.parametrize("tamper", [shift, swap_tables, short])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_metadata_shows(layout: str, tamper: Callable[[dict[str, torch.Tensor]], None]) -> None:
    assert not worst(layout, tamper=tamper) < 100 * BOUND


def test_lowered_names_are_stable() -> None:
    assert lower(rewritten("paged")).digest() == lower(rewritten("paged")).digest()
