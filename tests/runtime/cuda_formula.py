"""A cuda device whose logits are a formula, its launch plan, and an executor over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.errors import ExecutorError
from llmopt.launch import (
    MAX_ALTERNATIVES,
    MAX_BIASES,
    RECORD_WORDS,
    REPORT_WORDS,
    SAMPLING_RECORD,
    Bucket,
    LaunchPlan,
    View,
)
from llmopt.program import Function, Program, StateGroup, StatePlan, StateSpec
from llmopt.runtime import sampler as sampler_module
from llmopt.runtime.allowed import AllowedTokens
from llmopt.runtime.executors.cuda.backend import Result, Tail
from llmopt.runtime.executors.cuda.drawing import RECORD, has_penalties
from llmopt.runtime.executors.cuda.executor import CudaExecutor
from llmopt.runtime.executors.cuda.steps import Arrays
from llmopt.runtime.protocol import (
    NO_TOKEN,
    Admission,
    FloatArray,
    IntArray,
    SamplingParams,
)

VOCAB, BLOCK, CONTEXT = 61, 4, 64
GROUP = StateGroup("paged", "paged", BLOCK, (StateSpec("k_0", 1, 2, "bfloat16", 0),))


WORDS = -(-VOCAB // 32)


def view(name: str, dtype: str, *shape: int) -> View:
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    return View(name, dtype, shape, strides)


def bucket(function: str, rows: int, count: int) -> Bucket:
    inputs = {
        "input_ids": view("input_ids", "int64", 1, rows), "position_ids": view("position_ids", "int64", 1, rows),
        "cu_seqlens": view("cu_seqlens", "int32", count + 1), "seq_lens": view("seq_lens", "int32", count),
        "logit_rows": view("logit_rows", "int64", count), "sample_slots": view("sample_slots", "int32", count),
        "sample_positions": view("sample_positions", "int32", count), "mask_rows": view("mask_rows", "int32", count),
        "block_table_paged": view("block_table_paged", "int32", count, CONTEXT // BLOCK),
        "slot_mapping_paged": view("slot_mapping_paged", "int64", rows),
    }  # fmt: skip
    dims = {"T": rows, "N": count, "M": count}
    logits, reports = view("logits", "float32", count, VOCAB), view("reports", "int32", count, REPORT_WORDS)
    return Bucket(function, dims, inputs, (), (), (), {}, 0, logits, view("sampled", "int32", count), reports)


PLACES = 8
PLAN = LaunchPlan(
    90,
    {},
    (*(bucket("decode", n, n) for n in (1, 4)), *(bucket("extend", t, n) for t in (8, 16) for n in (1, 4))),
    {
        "last_tokens": view("last_tokens", "int32", PLACES), "history": view("history", "int16", PLACES, VOCAB),
        "records": view("records", "int32", PLACES, RECORD_WORDS), "masks": view("masks", "int32", PLACES, WORDS),
        "bias_ids": view("bias_ids", "int32", PLACES, MAX_BIASES),
        "bias_values": view("bias_values", "float32", PLACES, MAX_BIASES),
    },
)  # fmt: skip
PROGRAM = Program(
    {"decode": Function("decode", (), (), (), {}), "extend": Function("extend", (), (), (), {})},
    {"decode": "decode", "extend": "extend"}, {}, StatePlan((GROUP,)), {}, CONTEXT, VOCAB,
)  # fmt: skip


def formula(history: IntArray) -> FloatArray:
    """Logits that depend on every token so far."""
    seed = int(np.sum((history + 1) * (np.arange(len(history)) * 7 + 3)) % (1 << 31))
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32)


class Formula:
    """A device whose states hold the tokens themselves, and which draws by what it was told of each place.

    ``forgets``: what a broken device would not look at.
    """

    def __init__(self, blocks: int = 48) -> None:
        self.blocks: Mapping[str, int] = {"paged": blocks}
        self.state = np.full(blocks * BLOCK, -1, np.int64)
        self.kept = {name: np.zeros(v.shape, v.dtype) for name, v in PLAN.persistent.items()}
        self.forwarded: dict[int, tuple[Bucket, Arrays, FloatArray]] = {}
        self.results: dict[int, Result] = {}
        self.tails: list[Tail] = []
        self.forgets = ""
        self.fault = False

    def keep(self, place: int, rows: Arrays) -> None:
        for name, row in rows.items():
            if name != self.forgets:
                self.kept[name][place, : len(row)] = row
        if self.forgets == "seed":
            at, _ = SAMPLING_RECORD["seed"]
            self.kept["records"][place, at] = 1

    def forward(self, bucket: int, inputs: Arrays) -> int:
        chosen = PLAN.buckets[bucket]
        assert set(inputs) == set(chosen.inputs)
        for name, kind in chosen.inputs.items():
            if not name.startswith("block_table"):
                assert inputs[name].shape == kind.shape
        ids = inputs["input_ids"][0].copy()
        ids[ids < 0] = self.kept["last_tokens"][-1 - ids[ids < 0]]
        written = inputs["slot_mapping_paged"] >= 0
        self.state[inputs["slot_mapping_paged"][written]] = ids[written]
        every = self._logits(inputs, int(inputs["cu_seqlens"][-1]))
        picked = inputs["logit_rows"][inputs["logit_rows"] < len(every)]
        logits = np.zeros((chosen.dims["M"], VOCAB), np.float32)
        logits[: len(picked)] = every[picked]
        handle = len(self.forwarded)
        self.forwarded[handle] = chosen, inputs, logits
        return handle

    def finish(self, handle: int, tail: Tail) -> None:
        chosen, inputs, logits = self.forwarded[handle]
        tokens = np.full(chosen.dims["M"], -1, np.int64)
        reports = np.zeros((chosen.dims["M"], REPORT_WORDS), np.int32)
        places = inputs["sample_slots"] if tail.draw != "nothing" else tokens
        for i in np.flatnonzero(places >= 0).tolist():
            place = int(places[i])
            if tail.draw == "greedy":
                tokens[i] = logits[i].argmax()
            else:
                tokens[i], reports[i] = self._draw(place, logits[i], int(inputs["sample_positions"][i]),
                                                   int(inputs["mask_rows"][i]), tail)  # fmt: skip
            if tokens[i] >= 0:
                self.kept["last_tokens"][place] = tokens[i]
                self.kept["history"][place, tokens[i]] += 2
        self.tails.append(tail)
        self.results[handle] = Result(tokens, reports if tail.reports else reports[:0], logits[tail.logits])

    def _draw(self, place: int, logits: FloatArray, position: int, mask_row: int, tail: Tail) -> tuple[int, Any]:
        """The host sampler's draw from the place's record, counts and biases."""
        words = self.kept["records"][place]
        fields = {name: words.view(RECORD)[name][0].item() for name in SAMPLING_RECORD}
        count = fields["biases"]
        ids, values = self.kept["bias_ids"][place, :count].tolist(), self.kept["bias_values"][place, :count].tolist()
        params = SamplingParams(
            fields["temperature"], fields["top_k"], fields["top_p"], fields["min_p"], fields["repetition"],
            fields["presence"], fields["frequency"], dict(zip(ids, values)),
        )  # fmt: skip
        history = self.kept["history"][place]
        row = sampler_module._Row(
            params, fields["seed"], position - (self.forgets == "positions"), 0, False, np.flatnonzero(history & 1),
            Counter({int(t): int(history[t] >> 1) for t in np.flatnonzero(history > 1)}),
        )  # fmt: skip
        if not has_penalties(params):
            row.counts, row.prompt = Counter(), np.zeros(0, np.int64)
        mask = None if mask_row < 0 or self.forgets == "masks" else tail.masks[mask_row]
        edited = sampler_module._edit(row, logits)
        if mask is not None:
            edited = AllowedTokens(VOCAB).of(mask).only(edited)
        if edited.max() == -np.inf:
            return NO_TOKEN, 0
        token = sampler_module._draw(edited, params, sampler_module._draws([row]).get(0, 0.0))
        report = np.zeros(REPORT_WORDS, np.int32)
        if fields["logprobs"] >= 0:
            found = sampler_module.report(logits, token, fields["logprobs"])
            floats, (ids, values) = report.view(np.float32), zip(*found.top) if found.top else ((), ())
            floats[0], report[1 : 1 + len(ids)] = found.logprob, ids
            floats[1 + MAX_ALTERNATIVES : 1 + MAX_ALTERNATIVES + len(ids)] = values
        return token, report

    def _logits(self, inputs: Arrays, count: int) -> FloatArray:
        found = np.zeros((count, VOCAB), np.float32)
        for i, table in enumerate(inputs["block_table_paged"]):
            start, stop = inputs["cu_seqlens"][i : i + 2]
            slots = (table[:, None].astype(np.int64) * BLOCK + np.arange(BLOCK)).reshape(-1)
            for row in range(start, stop):
                history = self.state[slots[: inputs["seq_lens"][i] - (stop - 1 - row)]]
                found[row] = formula(history)
        return found

    def result(self, handle: int) -> Result:
        if self.fault:
            raise ExecutorError("a kernel touched memory that is not its own; the engine is dead")
        return self.results.pop(handle)

    def copy_blocks(self, group: StateGroup, source: IntArray, target: IntArray) -> None:
        grid = self.state.reshape(-1, BLOCK)
        grid[target] = grid[source]

    def read_blocks(self, group: StateGroup, blocks: IntArray) -> list[npt.NDArray[np.uint8]]:
        return [self.state.reshape(-1, BLOCK)[blocks].view(np.uint8).copy()]

    def write_blocks(self, group: StateGroup, blocks: IntArray, data: list[npt.NDArray[np.uint8]]) -> None:
        self.state.reshape(-1, BLOCK)[blocks] = data[0].view(np.int64)

    def close(self) -> None:
        self.results.clear()


def executor(backend: Formula | None = None) -> CudaExecutor:
    return CudaExecutor(PROGRAM, PLAN, backend or Formula(), 4, CONTEXT)


def admit(seq_id: int, prompt: IntArray, **sampling: Any) -> tuple[Admission, ...]:
    return (Admission(seq_id, prompt, SamplingParams(**{"temperature": 0, **sampling})),)


def without(*tokens: int) -> npt.NDArray[np.uint32]:
    """A mask that allows all other tokens."""
    allowed = np.ones(WORDS * 32, bool)
    allowed[list(tokens)] = False
    return np.packbits(allowed, bitorder="little").view(np.uint32)
