"""Splits a step into calls of the model: all one-row sequences together, each longer chunk by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llmopt.errors import ExecutorError
from llmopt.runtime.executors.onnxruntime_state import SlotStates
from llmopt.runtime.protocol import IntArray, SeqStep

MAX_GAP = 3
"""Idle slots a decode call may span. On the 125M shape a row more costs 1.4 ms; a call of its own 12.8 ms at fp32 and
2.9 ms at int4, so the gap that breaks even lies between 2 and 9."""


@dataclass(frozen=True)
class Call:
    """One run of the model over the slots ``low`` to ``low + len(lengths)``.

    ``rows``: its sequences, ``slots`` and ``ends`` (tokens in the slot afterwards) beside them, ``starts`` the index
    of each one's first row among the T rows. ``tokens``, ``positions`` (1, T) and ``rope_lens`` (1, T) are int64;
    ``lengths`` (B,) int64 are the slots' lengths including the new rows.
    """

    rows: tuple[SeqStep, ...]
    slots: tuple[int, ...]
    ends: tuple[int, ...]
    starts: tuple[int, ...]
    low: int
    tokens: IntArray
    positions: IntArray
    rope_lens: IntArray
    lengths: IntArray


def calls_of(
    rows: Sequence[SeqStep], slots: Sequence[int], states: SlotStates, last_token: Callable[[int], int]
) -> Iterator[Call]:
    """The calls of a step. GroupQueryAttention takes several sequences with a past only at one row each.

    Raises ExecutorError for a row that the model cannot run: a tree, or one past the context.
    """
    for row in rows:
        if row.tree is not None:
            raise ExecutorError("this program has no tree attention", where=f"sequence {row.seq_id}")
        if row.start + row.query_len > states.context:
            raise ExecutorError(f"a row at position {row.start + row.query_len - 1} is past the context of "
                                f"{states.context}", where=f"sequence {row.seq_id}")  # fmt: skip
    singles = sorted((slot, i) for i, slot in enumerate(slots) if rows[i].query_len == 1)
    for run in runs(singles):
        yield decode(run, rows, states, last_token)
    for row, slot in zip(rows, slots):
        if row.query_len > 1:
            yield chunk(row, slot)


def runs(singles: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """(slot, index) pairs cut where more than MAX_GAP idle slots lie between."""
    cuts = [i for i, (a, b) in enumerate(pairwise(singles), 1) if b[0] - a[0] - 1 > MAX_GAP]
    for start, stop in pairwise([0, *cuts, len(singles)]):
        if start < stop:
            yield list(singles[start:stop])


def decode(
    run: Sequence[tuple[int, int]], rows: Sequence[SeqStep], states: SlotStates, last_token: Callable[[int], int]
) -> Call:
    """One row for every slot of a range; idle slots take a row of token 0 behind their last token."""
    low, high = run[0][0], run[-1][0] + 1
    ends = states.lengths[low:high] + 1
    tokens, positions = np.zeros(high - low, np.int64), states.lengths[low:high].copy()
    rope_lens = ends.copy()
    for slot, index in run:
        row, at = rows[index], slot - low
        tokens[at] = last_token(row.seq_id) if row.tokens is None else row.tokens[0]
        positions[at] = row.start if row.positions is None else row.positions[0]
        ends[at] = row.start + 1
        rope_lens[at] = max(row.rope_len, row.start + 1)
    chosen = tuple(rows[index] for _, index in run)
    slots = tuple(slot for slot, _ in run)
    starts = tuple(slot - low for slot in slots)
    done = tuple(int(ends[start]) for start in starts)
    return Call(chosen, slots, done, starts, low, tokens[None], positions[None], rope_lens[None], ends)


def chunk(row: SeqStep, slot: int) -> Call:
    """Several rows of one sequence."""
    assert row.tokens is not None
    end = row.start + row.query_len
    positions = np.arange(row.start, end) if row.positions is None else row.positions
    rope_lens = np.full(row.query_len, max(row.rope_len, end), np.int64)
    return Call(
        (row,), (slot,), (end,), (0,), slot, row.tokens[None].astype(np.int64), positions[None].astype(np.int64),
        rope_lens[None], np.array([end], np.int64),
    )  # fmt: skip
