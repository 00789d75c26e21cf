"""Steps to buckets: which bucket runs which rows, and its inputs padded to the bucket's extents (numpy only)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.errors import ExecutorError
from llmopt.launch import Bucket, LaunchPlan
from llmopt.program import StatePlan
from llmopt.runtime.protocol import DecodeRows, IntArray, SeqStep, StepBatch
from llmopt.runtime.ragged import ragged_inputs

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """Rows that go through the device together: the bucket's index and the rows, explicit ones or plain decode rows."""

    bucket: int
    rows: tuple[SeqStep, ...] = ()
    decode: DecodeRows | None = None


@dataclass(frozen=True)
class Drawing:
    """The rows of a part that draw: sequences, their row of logits (n,), the position of the token (n,)."""

    seq_ids: list[int]
    rows: IntArray
    positions: IntArray


class Buckets:
    """The plan's buckets by function, smallest first."""

    def __init__(self, plan: LaunchPlan) -> None:
        self.buckets = plan.buckets
        order = sorted(range(len(plan.buckets)), key=lambda i: (plan.buckets[i].dims["T"], plan.buckets[i].dims["N"]))
        self.decode = [i for i in order if plan.buckets[i].function == "decode"]
        self.extend = [i for i in order if plan.buckets[i].function == "extend"]
        self.max_decode = max(plan.buckets[i].dims["N"] for i in self.decode)
        self.extend_rows = tuple(sorted({plan.buckets[i].dims["T"] for i in self.extend}))
        self.max_rows = self.extend_rows[-1]
        self.max_parts = max(plan.buckets[i].dims["N"] for i in self.extend)

    def pick(self, function: str, rows: int, sequences: int) -> int:
        """Index of the smallest bucket that holds them; raises ExecutorError when there is none."""
        for index in self.decode if function == "decode" else self.extend:
            dims = self.buckets[index].dims
            if dims["T"] >= rows and dims["N"] >= sequences:
                return index
        raise ExecutorError(f"no {function} bucket holds {rows} rows of {sequences} sequences")

    def decode_parts(self, decode: DecodeRows) -> Iterator[Part]:
        """Cut plain decode rows so that each part fits a bucket."""
        for at in range(0, len(decode), self.max_decode):
            some = slice(at, at + self.max_decode)
            blocks = {name: table[some] for name, table in decode.blocks.items()}
            part = DecodeRows(decode.seq_ids[some], decode.starts[some], decode.rope_lens[some], blocks)
            yield Part(self.pick("decode", len(part), len(part)), decode=part)

    def parts(self, rows: Sequence[SeqStep]) -> Iterator[Part]:
        """Cut a step so that each part fits a bucket: one row a sequence is decode, everything else extend.

        An extend bucket gives as many rows of logits as it holds sequences, so a sequence that wants the logits of
        all its rows may go in several pieces; they can share a part, since states are written before they are read.
        """
        if any(row.tree is not None for row in rows):
            raise ExecutorError("this program has no tree attention")
        if all(row.query_len == 1 for row in rows):
            for at in range(0, len(rows), self.max_decode):
                some = tuple(rows[at : at + self.max_decode])
                yield Part(self.pick("decode", len(some), len(some)), some)
            return
        pending: list[SeqStep] = []
        count = wanted = 0
        for piece in self.pieces(rows):
            full = count + piece.query_len > self.max_rows or wanted + logits_of(piece) > self.max_parts
            if pending and (full or len(pending) == self.max_parts):
                yield self.extend_part(pending, count, wanted)
                pending, count, wanted = [], 0, 0
            pending.append(piece)
            count, wanted = count + piece.query_len, wanted + logits_of(piece)
        yield self.extend_part(pending, count, wanted)

    def extend_part(self, rows: list[SeqStep], count: int, wanted: int) -> Part:
        """A part of the extend function."""
        return Part(self.pick("extend", count, max(len(rows), wanted)), tuple(rows))

    def pieces(self, rows: Sequence[SeqStep]) -> Iterator[SeqStep]:
        """Each row's sequence in pieces a part can hold."""
        for row in rows:
            size = min(self.max_rows, self.max_parts) if row.logits == "all" else self.max_rows
            if row.query_len <= size or row.tokens is None:
                yield row
                continue
            for at in range(0, row.query_len, size):
                last = at + size >= row.query_len
                yield replace(
                    row,
                    tokens=row.tokens[at : at + size],
                    start=row.start + at,
                    positions=None if row.positions is None else row.positions[at : at + size],
                    sample=row.sample and last,
                    logits=row.logits if last or row.logits == "all" else "none",
                    rope_len=max(row.rope_len, row.start + row.query_len),
                )


def logits_of(row: SeqStep) -> int:
    """Rows of logits a row's sequence needs."""
    return row.query_len if row.logits == "all" else int(row.sample or row.logits == "last")


def drawing(part: Part, wanted: Sequence[IntArray]) -> Drawing:
    """Which rows of a part draw; ``wanted`` as ``padded_inputs`` gives it."""
    if part.decode is not None:
        return Drawing(part.decode.seq_ids.tolist(), np.arange(len(part.decode)), part.decode.starts + 1)
    found = [(row, index[-1]) for row, index in zip(part.rows, wanted) if row.sample]
    rows = np.array([index for _, index in found], np.int64)
    positions = np.array([row.start + row.query_len for row, _ in found], np.int64)
    return Drawing([row.seq_id for row, _ in found], rows, positions)


def drawing_inputs(drawing: Drawing, places: IntArray, masked: Sequence[int], rows: int) -> Arrays:
    """What says which of ``rows`` rows of logits draw, in which places (n,); ``masked``: the sequences with a mask, in
    the order of the masks."""
    slots, positions, mask_rows = (np.full(rows, fill, np.int32) for fill in (-1, 0, -1))
    slots[drawing.rows], positions[drawing.rows] = places, drawing.positions
    if masked:
        numbers = {seq_id: i for i, seq_id in enumerate(masked)}
        mask_rows[drawing.rows] = [numbers.get(seq_id, -1) for seq_id in drawing.seq_ids]
    return {"sample_slots": slots, "sample_positions": positions, "mask_rows": mask_rows}


def padded_inputs(
    part: Part, bucket: Bucket, plan: StatePlan, last_token: Callable[[int], int]
) -> tuple[Arrays, list[IntArray]]:
    """The part's inputs at the bucket's extents, ``drawing_inputs`` apart, and the logits rows of each of its rows.

    Rows past the real ones have slot -1 (not written); sequences past them have no rows and length 0. In a decode
    bucket every row gives logits, row i sequence i's. ``last_token``: id of a row's last token, or below zero where
    the device has it.
    """
    arrays, wanted = ragged_inputs(StepBatch(part.rows, decode=part.decode), plan, last_token)
    dims = bucket.dims
    if bucket.function == "decode":
        arrays["logit_rows"] = np.arange(dims["M"], dtype=np.int64)
        wanted = [np.array([i]) for i in range(len(part.rows))]
    found: Arrays = {}
    for name, view in bucket.inputs.items():
        if name not in arrays:
            continue
        value = arrays[name]
        if name.startswith("block_table_"):
            found[name] = value
            continue
        padded = np.zeros(view.shape, value.dtype)
        if name.startswith("slot_mapping_"):
            padded.fill(-1)
        elif name == "cu_seqlens":
            padded.fill(value[-1])
        padded[..., : value.shape[-1]] = value
        found[name] = padded
    return found, wanted
