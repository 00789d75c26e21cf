"""Turns a StepBatch into the ragged inputs of a paged program (numpy, no device)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.program import StateGroup, StatePlan
from llmopt.runtime.protocol import IntArray, SeqStep, StepBatch


def slots_of(group: StateGroup, blocks: IntArray, positions: IntArray) -> IntArray:
    """Flat slot ``block * block_size + offset`` of each position of a sequence."""
    if group.kind == "ring":
        period = group.block_size - group.sinks
        offset = np.where(positions < group.sinks, positions, group.sinks + (positions - group.sinks) % period)
        return np.asarray(blocks[0] * group.block_size + offset, np.int64)
    return np.asarray(blocks[positions // group.block_size] * group.block_size + positions % group.block_size, np.int64)


def ragged_inputs(
    batch: StepBatch, plan: StatePlan, last_token: Callable[[int], int]
) -> tuple[dict[str, npt.NDArray[Any]], list[IntArray]]:
    """Inputs by name for all rows of the step, and for each sequence the indices of its logits among ``logit_rows``.

    Names and dtypes follow the program's convention (``input_ids``, ``position_ids``, ``cu_seqlens``, ``seq_lens``,
    ``rope_lens``, ``logit_rows``, ``block_table_<group>``, ``slot_mapping_<group>``).
    """
    rows = batch.rows
    lengths = np.array([r.query_len for r in rows], np.int64)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    positions = [np.arange(r.start, r.start + r.query_len) for r in rows]
    rotary = [p if r.positions is None else r.positions for r, p in zip(rows, positions)]
    tokens = [np.array([last_token(r.seq_id)]) if r.tokens is None else r.tokens for r in rows]
    ends = np.array([r.start for r in rows], np.int64) + lengths
    rope_lens = np.maximum(np.array([r.rope_len for r in rows], np.int64), ends)
    wanted = [logit_rows(r, int(start)) for r, start in zip(rows, bounds)]
    inputs: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.concatenate(tokens)[None].astype(np.int64),
        "position_ids": np.concatenate(rotary)[None].astype(np.int64),
        "cu_seqlens": bounds.astype(np.int32),
        "seq_lens": ends.astype(np.int32),
        "rope_lens": np.repeat(rope_lens, lengths)[None],
        "logit_rows": np.concatenate(wanted),
    }
    for group in plan.groups:
        tables = [r.blocks[group.name] for r in rows]
        table = np.zeros((len(rows), max(len(t) for t in tables)), np.int32)
        for i, blocks in enumerate(tables):
            table[i, : len(blocks)] = blocks
        inputs[f"block_table_{group.name}"] = table
        inputs[f"slot_mapping_{group.name}"] = np.concatenate(
            [slots_of(group, blocks, p) for blocks, p in zip(tables, positions)]
        )
    starts = np.concatenate(([0], np.cumsum([len(w) for w in wanted])))
    return inputs, [np.arange(a, b) for a, b in pairwise(starts)]


def logit_rows(row: SeqStep, start: int) -> IntArray:
    """Row indices of the step whose logits a sequence needs, to sample or to return."""
    if row.logits == "all":
        return np.arange(start, start + row.query_len, dtype=np.int64)
    last = row.logits == "last" or row.sample
    return np.array([start + row.query_len - 1] if last else [], np.int64)
