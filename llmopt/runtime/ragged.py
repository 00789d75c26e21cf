"""Turns a StepBatch into the ragged inputs of a paged program (numpy, no device)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.program import StateGroup, StatePlan
from llmopt.runtime.protocol import DecodeRows, IntArray, SeqStep, StepBatch


def offset_in(group: StateGroup, positions: IntArray) -> IntArray:
    """Where in its block each position lies."""
    if group.kind == "ring":
        period = group.block_size - group.sinks
        wrapped = group.sinks + (positions - group.sinks) % period
        return np.where(positions < group.sinks, positions, wrapped)
    return np.asarray(positions % group.block_size, np.int64)


def slots_of(group: StateGroup, blocks: IntArray, positions: IntArray) -> IntArray:
    """Flat slot ``block * block_size + offset`` of each position of a sequence."""
    column = positions // group.block_size if group.kind == "paged" else 0
    return np.asarray(blocks[column] * group.block_size + offset_in(group, positions), np.int64)


def ragged_inputs(
    batch: StepBatch, plan: StatePlan, last_token: Callable[[int], int]
) -> tuple[dict[str, npt.NDArray[Any]], list[IntArray]]:
    """Inputs by name for all rows of the step, and for each sequence the indices of its logits among ``logit_rows``.

    Decode rows come first. Names and dtypes follow the program's convention (``input_ids``, ``position_ids``,
    ``cu_seqlens``, ``seq_lens``, ``rope_lens``, ``logit_rows``, ``block_table_<group>``, ``slot_mapping_<group>``).
    """
    decode, rows = decode_inputs(batch.decode, plan, last_token), row_inputs(batch.rows, plan, last_token)
    if not batch.rows:
        return decode
    if batch.decode is None:
        return rows
    (first, found), (second, wanted) = decode, rows
    count, indices = len(batch.decode), len(first["logit_rows"])
    inputs = {
        "cu_seqlens": np.concatenate((first["cu_seqlens"], second["cu_seqlens"][1:] + first["cu_seqlens"][-1])),
        "logit_rows": np.concatenate((first["logit_rows"], second["logit_rows"] + count)),
    }
    for name in first.keys() - inputs.keys():
        if name.startswith("block_table_"):
            inputs[name] = _stacked(first[name], second[name])
        else:
            inputs[name] = np.concatenate((first[name], second[name]), axis=-1)
    return inputs, found + [w + indices for w in wanted]


def decode_inputs(
    decode: DecodeRows | None, plan: StatePlan, last_token: Callable[[int], int]
) -> tuple[dict[str, npt.NDArray[Any]], list[IntArray]]:
    """``ragged_inputs`` of decode rows: one row a sequence, each of which wants its logits."""
    if decode is None:
        return {}, []
    count, starts = len(decode), decode.starts
    each = np.arange(count)
    inputs: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.fromiter(map(last_token, decode.seq_ids.tolist()), np.int64, count)[None],
        "position_ids": starts[None],
        "cu_seqlens": np.arange(count + 1, dtype=np.int32),
        "seq_lens": (starts + 1).astype(np.int32),
        "rope_lens": np.maximum(decode.rope_lens, starts + 1)[None],
        "logit_rows": each,
    }
    for group in plan.groups:
        table = decode.blocks[group.name]
        column = starts // group.block_size if group.kind == "paged" else 0
        inputs[f"block_table_{group.name}"] = table
        blocks = table[each, column].astype(np.int64)
        inputs[f"slot_mapping_{group.name}"] = blocks * group.block_size + offset_in(group, starts)
    return inputs, list(each[:, None])


def row_inputs(
    rows: Sequence[SeqStep], plan: StatePlan, last_token: Callable[[int], int]
) -> tuple[dict[str, npt.NDArray[Any]], list[IntArray]]:
    """``ragged_inputs`` of explicit rows."""
    if not rows:
        return {}, []
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


def _stacked(*tables: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Block tables (n, W) on top of each other, padded with zeros to the widest one."""
    width, rows = max(t.shape[1] for t in tables), sum(len(t) for t in tables)
    stacked, at = np.zeros((rows, width), np.int32), 0
    for table in tables:
        stacked[at : at + len(table), : table.shape[1]] = table
        at += len(table)
    return stacked


def logit_rows(row: SeqStep, start: int) -> IntArray:
    """Row indices of the step whose logits a sequence needs, to sample or to return."""
    if row.logits == "all":
        return np.arange(start, start + row.query_len, dtype=np.int64)
    last = row.logits == "last" or row.sample
    return np.array([start + row.query_len - 1] if last else [], np.int64)
