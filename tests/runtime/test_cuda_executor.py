"""The cuda executor over a backend whose logits are a formula: buckets, places, run-ahead, mixed sampling, faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmopt.errors import ExecutorError, RequestError, ResourceError
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
from llmopt.runtime.core import EngineCore
from llmopt.runtime.executors.cuda.backend import Result, Tail
from llmopt.runtime.executors.cuda.drawing import RECORD, has_penalties
from llmopt.runtime.executors.cuda.executor import CudaExecutor
from llmopt.runtime.executors.cuda.layout import Budget, describe_states, size_blocks
from llmopt.runtime.executors.cuda.steps import Arrays, Buckets
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import (
    Admission,
    FloatArray,
    IntArray,
    Sampled,
    SamplingParams,
    SeqStep,
    StateOp,
    StepBatch,
)
from llmopt.runtime.sampler import HostSampler

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
        try:
            edited = sampler_module._edit(row, logits, mask)
        except RequestError:
            return -2, 0
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


KINDS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 0.8, "top_k": 9}, {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0, "logprobs": 2}, {"temperature": 1.1, "top_p": 0.7, "frequency_penalty": 0.9, "logprobs": 0},
    {"temperature": 1.4, "min_p": 0.05, "presence_penalty": 1.5}, {"temperature": 0, "logit_bias": {3: 9.0, 60: 8.9}},
]  # fmt: skip
"""Every way to draw."""


def params(index: int) -> GenerationParams:
    """The kinds in turn."""
    sampling = SamplingParams(seed=2**62 + index, **KINDS[index % len(KINDS)])
    return GenerationParams(max_tokens=5 + index % 9, sampling=sampling, ignore_eos=True)


PROMPTS = [[(7 * i + j) % VOCAB for j in range(1 + 5 * i % 23)] for i in range(9)]


def expected(prompt: list[int], chosen: GenerationParams) -> list[Sampled]:
    """What a sequence draws when it is alone on the host."""
    sampler = HostSampler(VOCAB)
    sampler.admit(Admission(0, np.array(prompt), chosen.sampling))
    history, found = list(prompt), []
    for _ in range(chosen.max_tokens or 0):
        found += sampler.sample_rows([0], formula(np.array(history))[None])
        history.append(found[-1].token)
    return found


def generate(found: CudaExecutor, chosen: list[GenerationParams]) -> list[list[Sampled]]:
    """What the engine gives each of the prompts."""
    core = EngineCore(found)
    ids = [core.add(p, c) for p, c in zip(PROMPTS, chosen)]
    outputs: dict[int, list[Sampled]] = {i: [] for i in ids}
    while core.has_work:
        for output in core.step():
            outputs[output.request_id].append(output.sampled)
    return [outputs[i] for i in ids]


def close(ours: Sampled, theirs: Sampled) -> bool:
    """Equal, log-probabilities up to fp32."""
    numbers = [(ours.logprob, theirs.logprob), *((a, b) for (_, a), (_, b) in zip(ours.top, theirs.top))]
    same = ours.token == theirs.token and [i for i, _ in ours.top] == [i for i, _ in theirs.top]
    return same and all(a == b or abs(a - b) < 1e-5 for a, b in numbers)  # type: ignore[operator]


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("greedy", [True, False])
def test_every_sequence_draws_what_it_draws_alone(ahead: int, greedy: bool) -> None:
    found = executor()
    found.limits = replace(found.limits, steps_in_flight=ahead)
    chosen = [params(len(KINDS) * i if greedy else i) for i in range(9)]
    drawn, alone = generate(found, chosen), [expected(p, c) for p, c in zip(PROMPTS, chosen)]
    assert all(
        close(a, b) for ours, theirs in zip(drawn, alone, strict=True) for a, b in zip(ours, theirs, strict=True)
    )
    assert sorted(found.free) == list(range(PLACES))
    kinds = {tail.draw for tail in found.backend.tails}  # type: ignore[attr-defined]
    assert "full" not in kinds if greedy else "full" in kinds


@pytest.mark.parametrize("forgets", ["seed", "history", "bias_ids", "positions"])
def test_a_device_that_forgets_draws_something_else(forgets: str) -> None:
    backend = Formula()
    backend.forgets = forgets
    chosen = [params(i) for i in range(9)]
    tokens = [[s.token for s in drawn] for drawn in generate(executor(backend), chosen)]
    assert tokens != [[s.token for s in expected(p, c)] for p, c in zip(PROMPTS, chosen)]


def test_preempted_sequences_go_on_as_before() -> None:
    """With blocks for two sequences, what was drawn before counts when the counts are built again."""
    chosen = [replace(params(i), max_tokens=20) for i in (2, 4, 5, 1, 2, 4, 5, 1, 4)]
    backend = Formula(blocks=16)
    drawn = generate(executor(backend), chosen)
    assert [[s.token for s in d] for d in drawn] == [[s.token for s in expected(p, c)] for p, c in zip(PROMPTS, chosen)]


def test_counts_are_rebuilt_from_the_output() -> None:
    prompt, output = np.array([5, 6]), np.array([9, 9, 8])
    sampling = SamplingParams(temperature=0, repetition_penalty=1.9, frequency_penalty=1.5)
    history = np.concatenate((prompt, output))
    row = SeqStep(0, history, 0, {"paged": np.arange(2)}, sample=True)
    found = executor()
    ticket = found.submit(StepBatch((row,), admit=(Admission(0, prompt, sampling, output),)))
    counts = np.bincount(np.append(output, found.collect(ticket).sampled[0].token), minlength=VOCAB) * 2
    counts[prompt] += 1
    kept = found.backend.kept["history"][found.sequences[0].place]  # type: ignore[attr-defined]
    assert np.array_equal(kept, counts)


def test_drawing_brings_no_logits_back() -> None:
    found = executor()
    generate(found, [params(i) for i in range(9)])
    tails = found.backend.tails  # type: ignore[attr-defined]
    assert {len(tail.logits) for tail in tails} == {0}
    assert {tail.reports for tail in tails} == {True, False}


def test_only_rows_that_ask_bring_their_logits() -> None:
    found, prompts = executor(), [np.arange(1 + i) for i in range(3)]
    rows = tuple(
        SeqStep(i, p, 0, {"paged": np.array([i])}, sample=True, logits="last" if i == 1 else "none")
        for i, p in enumerate(prompts)
    )
    admissions = tuple(a for i, p in enumerate(prompts) for a in admit(i, p))
    output = found.collect(found.submit(StepBatch(rows, admit=admissions)))
    assert found.backend.tails[-1].logits.tolist() == [1]  # type: ignore[attr-defined]
    assert np.array_equal(output.logits[1], formula(prompts[1])[None])
    assert [output.sampled[i].token for i in range(3)] == [formula(p).argmax() for p in prompts]


def admit(seq_id: int, prompt: IntArray, **sampling: Any) -> tuple[Admission, ...]:
    return (Admission(seq_id, prompt, SamplingParams(**{"temperature": 0, **sampling})),)


def test_a_long_prompt_with_all_logits_goes_in_pieces() -> None:
    found, prompt = executor(), np.arange(30) % VOCAB
    row = SeqStep(0, prompt, 0, {"paged": np.arange(8)}, sample=True, logits="all")
    output = found.collect(found.submit(StepBatch((row,), admit=admit(0, prompt))))
    assert np.array_equal(output.logits[0], np.stack([formula(prompt[: i + 1]) for i in range(30)]))
    assert output.sampled[0].token == formula(prompt).argmax()


class LateMasks(dict[int, npt.NDArray[np.uint32]]):
    """Masks that may not be read before the forward pass is on its way."""

    def __init__(self, masks: Mapping[int, npt.NDArray[np.uint32]], backend: Formula) -> None:
        super().__init__(masks)
        self.backend = backend

    def __getitem__(self, seq_id: int) -> npt.NDArray[np.uint32]:
        assert len(self.backend.forwarded) == len(self.backend.results) + 1
        return super().__getitem__(seq_id)


def without(*tokens: int) -> npt.NDArray[np.uint32]:
    """A mask that allows all other tokens."""
    allowed = np.ones(WORDS * 32, bool)
    allowed[list(tokens)] = False
    return np.packbits(allowed, bitorder="little").view(np.uint32)


def masked_step(backend: Formula) -> tuple[list[int], list[IntArray]]:
    """Tokens of four sequences, the second and third masked; the orders of their logits, best first."""
    found, prompts = executor(backend), [np.array([5, i]) for i in range(4)]
    orders = [np.argsort(-formula(p)) for p in prompts]
    rows = tuple(SeqStep(i, p, 0, {"paged": np.array([i])}, sample=True) for i, p in enumerate(prompts))
    masks = LateMasks({1: without(orders[1][0]), 2: without(*orders[2][:2])}, backend)
    admissions = tuple(a for i, p in enumerate(prompts) for a in admit(i, p, logprobs=1 if i == 3 else None))
    output = found.collect(found.submit(StepBatch(rows, admit=admissions, masks=masks)))
    assert [i for i, _ in output.sampled[3].top] == [orders[3][0]]
    return [output.sampled[i].token for i in range(4)], orders


def test_masks_are_read_after_the_forward_pass_and_hold_for_their_rows() -> None:
    tokens, orders = masked_step(Formula())
    assert tokens == [orders[0][0], orders[1][1], orders[2][2], orders[3][0]]
    forgetful = Formula()
    forgetful.forgets = "masks"
    assert masked_step(forgetful)[0] == [order[0] for order in orders]


def test_a_mask_that_allows_nothing_fails_its_step_alone() -> None:
    found, prompt = executor(), np.array([5, 6])
    row = SeqStep(0, prompt, 0, {"paged": np.arange(1)}, sample=True)
    nothing = {0: np.zeros(WORDS, np.uint32)}
    ticket = found.submit(StepBatch((row,), admit=admit(0, prompt), masks=nothing))
    with pytest.raises(RequestError, match="no token is allowed in sequence 0"):
        found.collect(ticket)
    assert found.collect(found.submit(StepBatch((row,)))).sampled[0].token == formula(prompt).argmax()


@pytest.mark.parametrize(("sampling", "words"), [
    ({"logit_bias": dict.fromkeys(range(MAX_BIASES + 1), 1.0)}, "1024 tokens can be biased"),
    ({"logprobs": MAX_ALTERNATIVES + 1}, "20 alternatives"),
])  # fmt: skip
def test_more_than_the_device_has_room_for_is_refused(sampling: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        executor().submit(StepBatch((), admit=admit(0, np.array([1]), **sampling)))


def test_blocks_are_copied_and_swapped() -> None:
    found, prompt = executor(), np.arange(4)
    found.collect(
        found.submit(StepBatch((SeqStep(0, prompt, 0, {"paged": np.array([3])}, sample=True),), admit=admit(0, prompt)))
    )
    ops = (
        StateOp("copy", "paged", np.array([3]), np.array([9])),
        StateOp("swap_out", "paged", np.array([9]), np.array([], np.int64), key=1),
        StateOp("copy", "paged", np.array([0]), np.array([9])),
        StateOp("swap_in", "paged", np.array([], np.int64), np.array([11]), key=1),
    )
    row = SeqStep(0, np.array([8]), 4, {"paged": np.array([11, 12])}, logits="last")
    output = found.collect(found.submit(StepBatch((row,), ops=ops)))
    assert np.array_equal(output.logits[0][0], formula(np.array([0, 1, 2, 3, 8])))


def test_a_fault_kills_the_engine() -> None:
    found, prompt = executor(), np.arange(4)
    row = SeqStep(0, prompt, 0, {"paged": np.array([3])}, sample=True)
    ticket = found.submit(StepBatch((row,), admit=admit(0, prompt)))
    found.backend.fault = True  # type: ignore[attr-defined]
    with pytest.raises(ExecutorError, match="not its own"):
        found.collect(ticket)
    with pytest.raises(ExecutorError, match="the engine is dead"):
        found.submit(StepBatch(()))


def test_too_many_sequences_are_refused() -> None:
    found = executor()
    for seq_id in range(PLACES):
        found.submit(StepBatch((), admit=admit(seq_id, np.array([1]))))
    with pytest.raises(RequestError, match="sequences at once"):
        found.submit(StepBatch((), admit=admit(99, np.array([1]))))


def test_parts_fit_their_buckets() -> None:
    buckets = Buckets(PLAN)
    table = {"paged": np.arange(16)}
    rows = [SeqStep(i, np.zeros(n, np.int64), 0, table, sample=True) for i, n in enumerate((40, 1, 1, 7, 1, 16))]
    parts = list(buckets.parts(rows))
    assert sum(row.query_len for part in parts for row in part.rows) == 66
    for part in parts:
        dims = PLAN.buckets[part.bucket].dims
        assert sum(row.query_len for row in part.rows) <= dims["T"]
        assert len(part.rows) <= dims["N"]
    pieces = [row for part in parts for row in part.rows if row.seq_id == 0]
    assert [(r.start, r.query_len, r.sample) for r in pieces] == [
        (0, 16, False),
        (16, 16, False),
        (32, 8, True),
    ]
    decode = list(buckets.parts([SeqStep(i, None, 3, table, sample=True) for i in range(6)]))
    assert [PLAN.buckets[part.bucket].dims["N"] for part in decode] == [4, 4]


def budget(free: int, kv_bytes: int | None = None) -> Budget:
    return Budget(weights=10 << 30, arena=1 << 30, inputs=1 << 20, free=free, kv_bytes=kv_bytes)


def test_blocks_are_sized_from_free_memory() -> None:
    states = StatePlan((replace(GROUP, states=(StateSpec("k_0", 64, 4096, "bfloat16", 0),)),))
    per_block = states.groups[0].block_bytes()
    assert size_blocks(states, budget(1 << 40), 8, CONTEXT) == {"paged": 8 * CONTEXT // BLOCK}
    fitting = size_blocks(states, budget((12 << 30) + 40 * per_block), 8, CONTEXT)["paged"]
    assert 16 <= fitting <= 40 + (512 << 20) // per_block
    assert size_blocks(states, budget(1 << 40, 20 * per_block), 8, CONTEXT)["paged"] == 20
    assert describe_states(states, {"paged": 20}, CONTEXT) == "KV 0.04 GB (paged: 20 blocks of 4 tokens), context 64"
    with pytest.raises(ResourceError, match=r"GB short .*lower --max-context"):
        size_blocks(states, budget(11 << 30), 8, CONTEXT)
    with pytest.raises(ResourceError, match="hold less than one sequence"):
        size_blocks(states, budget(1 << 40, 3 * per_block), 8, CONTEXT)
