"""A deterministic executor whose next token depends on what it finds in its blocks, so that scheduler mistakes show."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from llmopt.errors import ExecutorError, RequestError
from llmopt.program import StateGroup, StatePlan, StateSpec
from llmopt.runtime.params import Grammar
from llmopt.runtime.protocol import ExecutorLimits, SeqStep, StateOp, StepBatch, StepOutput
from llmopt.runtime.ragged import slots_of
from llmopt.runtime.sampler import HostSampler

EMPTY = -1
MODULUS = 1_000_003
TURNS = 3


def plan_of(*kinds: str, block_size: int = 4, context: int = 64, window: int = 6, sinks: int = 2, chunk: int = 3):
    """A state plan with one group of each kind."""
    groups = []
    for i, kind in enumerate(kinds):
        size = {"paged": block_size, "slots": context, "ring": sinks + window - 1 + chunk}[kind]
        ring = {"window": window, "sinks": sinks, "truncatable": False} if kind == "ring" else {}
        states = (StateSpec(f"k_{i}", 1, 1, "float32", 0),)
        groups.append(StateGroup(f"{kind}{i}", kind, size, states, shareable=kind == "paged", **ring))
    return StatePlan(tuple(groups))


def mix(tokens, positions, vocab_size: int, table: int = 0) -> int:
    """The toy model: a hash of tokens, their positions and the rotary table."""
    value = 17 + 31 * table
    for token, position in zip(tokens, positions):
        value = (value * 131 + int(token) * 7 + int(position)) % MODULUS
    return value % vocab_size


def visible(group: StateGroup, length: int) -> np.ndarray:
    """Positions the last row of a sequence of ``length`` tokens attends to."""
    positions = np.arange(length)
    if group.kind != "ring":
        return positions
    return positions[(positions < group.sinks) | (positions > length - 1 - group.window)]


def oracle(
    prompt, count: int, plan: StatePlan, vocab_size: int, switch: int | None = None, takes_turns: bool = False
) -> list[int]:
    """What a sequence generates when it is alone; with ``takes_turns`` under the masks of ``Turns``."""
    tokens = list(prompt)
    for k in range(count):
        token = next_token(tokens, plan, vocab_size, switch)
        tokens.append(k % TURNS if takes_turns and token % TURNS != k % TURNS else token)
    return tokens[len(prompt) :]


def logits_after(tokens, vocab_size: int) -> np.ndarray:
    """A row of logits that depends on all tokens so far, for prompts whose log-probabilities are wanted."""
    seed = int(np.dot(np.arange(1, len(tokens) + 1), tokens)) % 100_003
    return np.random.default_rng(seed).normal(size=vocab_size).astype(np.float32)


class Turns:
    """Stands in for the engine's constraints: the k-th token drawn, from 0, is k modulo TURNS."""

    def __init__(self, vocab_size: int) -> None:
        self.drawn: dict[int, int] = {}
        words = np.zeros((TURNS, -(-vocab_size // 32)), np.uint32)
        for token in range(vocab_size):
            words[token % TURNS, token >> 5] |= np.uint32(1 << (token & 31))
        self.words = words

    def add(self, seq_id: int, grammar: Grammar) -> None:
        """A sequence begins."""
        self.drawn[seq_id] = 0

    def accept(self, tokens: Mapping[int, int]) -> Mapping[int, RequestError]:
        """Every token is one its mask allowed."""
        for seq_id, token in tokens.items():
            if seq_id in self.drawn:
                assert token % TURNS == self.drawn[seq_id] % TURNS, "drawn under another mask"
                self.drawn[seq_id] += 1
        return {}

    def masks(self, seq_ids: Sequence[int]) -> dict[int, np.ndarray]:
        """Of the next token of each."""
        return {seq_id: self.words[self.drawn[seq_id] % TURNS] for seq_id in seq_ids if seq_id in self.drawn}

    def forget(self, seq_id: int) -> None:
        """A sequence has ended."""
        self.drawn.pop(seq_id, None)


def next_token(tokens, plan: StatePlan, vocab_size: int, switch: int | None = None) -> int:
    """The greedy token after ``tokens``."""
    table = int(switch is not None and len(tokens) > switch)
    total = 0
    for group in plan.groups:
        seen = visible(group, len(tokens))
        total += mix([tokens[p] for p in seen], seen, vocab_size, table)
    return total % vocab_size


def written_blocks(group: StateGroup, row: SeqStep) -> list[int]:
    """Blocks of a group that a row's sequence writes in its step."""
    first = row.start // group.block_size if group.kind == "paged" else 0
    return row.blocks[group.name].tolist()[first:]


class FakeExecutor:
    """Writes (token, position, rotary table) into slots and reads them back; checks the protocol as it goes.

    ``lazy``: steps run when they are collected or overtaken, as on a device that runs behind the host.
    """

    def __init__(self, plan: StatePlan, limits: ExecutorLimits, fail_at: int | None = None) -> None:
        self.state_plan, self.limits, self.fail_at = plan, limits, fail_at
        self.cells = {g.name: np.full((limits.blocks[g.name] * g.block_size, 3), EMPTY, np.int64) for g in plan.groups}
        self.sampler = HostSampler(limits.vocab_size)
        self.known: set[int] = set()
        self.texts: dict[int, list[int]] = {}
        self.swapped: dict[tuple[str, int], np.ndarray] = {}
        self.largest = 0
        self.queue: deque[tuple[int, StepBatch]] = deque()
        self.done: dict[int, StepOutput] = {}
        self.tickets = self.rows = 0
        self.closed = False

    def submit(self, batch: StepBatch) -> int:
        assert len(self.queue) + len(self.done) < self.limits.steps_in_flight
        self._check(batch)
        self.tickets += 1
        self.queue.append((self.tickets, batch))
        return self.tickets

    def collect(self, ticket: int) -> StepOutput:
        while ticket not in self.done:
            number, batch = self.queue.popleft()
            self.done[number] = self._run(batch)
        return self.done.pop(ticket)

    def close(self) -> None:
        self.closed = True

    def _check(self, batch: StepBatch) -> None:
        rows = batch.all_rows(self.state_plan)
        ids = [row.seq_id for row in rows]
        assert len(set(ids)) == len(ids) <= self.limits.max_sequences
        assert sum(row.query_len for row in rows) <= self.limits.max_tokens_per_step
        self.largest = max(self.largest, sum(row.query_len for row in rows))
        for admission in batch.admit:
            assert admission.seq_id not in self.known, "admitted twice"
            self.known.add(admission.seq_id)
        assert set(ids) <= self.known, "rows of a sequence the executor does not know"
        for group in self.state_plan.groups:
            for row in rows:
                assert len(row.blocks[group.name]) == group.blocks_for(row.start + row.query_len)
                assert row.query_len <= (group.max_chunk() or row.query_len)
                assert all(0 <= b < self.limits.blocks[group.name] for b in row.blocks[group.name].tolist())
            written = [b for row in rows for b in written_blocks(group, row)]
            assert len(set(written)) == len(written), "two sequences write a block"
            for row in rows:
                read = row.blocks[group.name].tolist()[: -len(written_blocks(group, row))]
                assert not set(read) & set(written), "a sequence writes what another one reads"
        for seq_id in batch.release:
            self.known.remove(seq_id)

    def _run(self, batch: StepBatch) -> StepOutput:
        if self.fail_at is not None and self.tickets >= self.fail_at:
            raise ExecutorError("the device is gone")
        for admission in batch.admit:
            self.sampler.admit(admission)
            self.texts[admission.seq_id] = [*admission.prompt.tolist(), *admission.output.tolist()]
        for op in batch.ops:
            self._apply(op)
        drawn, asked = {}, {}
        for row in batch.all_rows(self.state_plan):
            self.rows += row.query_len
            token = self._forward(row)
            if row.logits == "all":
                ends, text = range(row.start + 1, row.start + row.query_len + 1), self.texts[row.seq_id]
                asked[row.seq_id] = np.stack([logits_after(text[:end], self.limits.vocab_size) for end in ends])
            if row.sample:
                logits = np.zeros((1, self.limits.vocab_size), np.float32)
                logits[0, token] = 8
                drawn[row.seq_id] = self.sampler.sample_rows([row.seq_id], logits, batch.masks)[0]
        for seq_id in batch.release:
            self.sampler.release(seq_id)
        return StepOutput(drawn, asked)

    def _apply(self, op: StateOp) -> None:
        group = next(g for g in self.state_plan.groups if g.name == op.group)
        cells = self.cells[op.group].reshape(-1, group.block_size, 3)
        match op.kind:
            case "copy":
                kept = op.length if op.length and group.kind == "slots" else group.block_size
                moved = cells[op.source]
                moved[:, kept:] = EMPTY
                cells[op.target] = moved
            case "swap_out":
                assert (op.group, op.key) not in self.swapped
                self.swapped[op.group, op.key] = cells[op.source]
            case "swap_in":
                cells[op.target] = self.swapped.pop((op.group, op.key))
            case "swap_drop":
                del self.swapped[op.group, op.key]
            case "truncate":
                assert group.truncatable
                cells[op.source] = np.where(cells[op.source][..., 1:2] < op.length, cells[op.source], EMPTY)

    def _forward(self, row: SeqStep) -> int:
        tokens = [self.sampler.last(row.seq_id)] if row.tokens is None else row.tokens
        end, switch = row.start + row.query_len, self.limits.rope_switch
        table = int(switch is not None and max(row.rope_len, end) > switch)
        positions = np.arange(row.start, end)
        total = 0
        for group in self.state_plan.groups:
            cells, blocks = self.cells[group.name], row.blocks[group.name]
            cells[slots_of(group, blocks, positions)] = np.stack(
                (tokens, positions, np.full(len(positions), table)), axis=1
            )
            seen = visible(group, end)
            found = cells[slots_of(group, blocks, seen)]
            tables = set(found[:, 2].tolist())
            total += mix(found[:, 0], found[:, 1], self.limits.vocab_size, max(tables) if len(tables) == 1 else 99)
        return total % self.limits.vocab_size
