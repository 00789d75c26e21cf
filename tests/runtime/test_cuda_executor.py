"""The cuda executor over a backend whose logits are a formula: buckets, slots, run-ahead, mixed sampling, faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmopt.errors import ExecutorError, RequestError, ResourceError
from llmopt.launch import Bucket, LaunchPlan, View
from llmopt.program import Function, Program, StateGroup, StatePlan, StateSpec
from llmopt.runtime.core import EngineCore
from llmopt.runtime.executors.cuda.executor import CudaExecutor
from llmopt.runtime.executors.cuda.layout import Budget, describe_states, size_blocks
from llmopt.runtime.executors.cuda.steps import Arrays, Buckets
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import Admission, FloatArray, IntArray, SamplingParams, SeqStep, StateOp, StepBatch
from llmopt.runtime.sampler import HostSampler

VOCAB, BLOCK, CONTEXT = 61, 4, 64
GROUP = StateGroup("paged", "paged", BLOCK, (StateSpec("k_0", 1, 2, "bfloat16", 0),))


def view(name: str, dtype: str, *shape: int) -> View:
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    return View(name, dtype, shape, strides)


def bucket(function: str, rows: int, count: int) -> Bucket:
    inputs = {
        "input_ids": view("input_ids", "int64", 1, rows), "position_ids": view("position_ids", "int64", 1, rows),
        "cu_seqlens": view("cu_seqlens", "int32", count + 1), "seq_lens": view("seq_lens", "int32", count),
        "logit_rows": view("logit_rows", "int64", count), "sample_slots": view("sample_slots", "int32", count),
        "block_table_paged": view("block_table_paged", "int32", count, CONTEXT // BLOCK),
        "slot_mapping_paged": view("slot_mapping_paged", "int64", rows),
    }  # fmt: skip
    dims = {"T": rows, "N": count, "M": count}
    logits = view("logits", "float32", count, VOCAB)
    return Bucket(function, dims, inputs, (), (), {}, 0, logits, view("sampled", "int32", count))


PLAN = LaunchPlan(
    90,
    {},
    (*(bucket("decode", n, n) for n in (1, 4)), *(bucket("extend", t, n) for t in (8, 16) for n in (1, 4))),
    {"last_tokens": view("last_tokens", "int32", 12)},
)
PROGRAM = Program(
    {"decode": Function("decode", (), (), (), {}), "extend": Function("extend", (), (), (), {})},
    {"decode": "decode", "extend": "extend"}, {}, StatePlan((GROUP,)), {}, CONTEXT, VOCAB,
)  # fmt: skip


def formula(history: IntArray) -> FloatArray:
    """Logits that depend on every token so far."""
    seed = int(np.sum((history + 1) * (np.arange(len(history)) * 7 + 3)) % (1 << 31))
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32)


class Formula:
    """A device whose states hold the tokens themselves."""

    blocks: Mapping[str, int] = {"paged": 48}

    def __init__(self) -> None:
        self.state = np.full(48 * BLOCK, -1, np.int64)
        self.last = np.zeros(12, np.int64)
        self.results: dict[int, tuple[IntArray, FloatArray]] = {}
        self.runs: list[tuple[int, int]] = []
        self.fault = False

    def run(self, bucket: int, inputs: Arrays, draw: bool, rows: int) -> int:
        chosen = PLAN.buckets[bucket]
        for name, kind in chosen.inputs.items():
            if not name.startswith("block_table"):
                assert inputs[name].shape == kind.shape
        ids = inputs["input_ids"][0].copy()
        ids[ids < 0] = self.last[-1 - ids[ids < 0]]
        written = inputs["slot_mapping_paged"] >= 0
        self.state[inputs["slot_mapping_paged"][written]] = ids[written]
        every = self._logits(inputs, int(inputs["cu_seqlens"][-1]))
        picked = inputs["logit_rows"][inputs["logit_rows"] < len(every)]
        logits = np.zeros((chosen.dims["M"], VOCAB), np.float32)
        logits[: len(picked)] = every[picked]
        sampled = np.full(chosen.dims["M"], -1, np.int64)
        if draw:
            drawing = np.flatnonzero(inputs["sample_slots"] >= 0)
            sampled[drawing] = logits[drawing].argmax(1)
            self.last[inputs["sample_slots"][drawing]] = sampled[drawing]
        self.runs.append((bucket, rows))
        self.results[len(self.runs)] = (sampled, logits[:rows])
        return len(self.runs)

    def _logits(self, inputs: Arrays, count: int) -> FloatArray:
        found = np.zeros((count, VOCAB), np.float32)
        for i, table in enumerate(inputs["block_table_paged"]):
            start, stop = inputs["cu_seqlens"][i : i + 2]
            slots = (table[:, None].astype(np.int64) * BLOCK + np.arange(BLOCK)).reshape(-1)
            for row in range(start, stop):
                history = self.state[slots[: inputs["seq_lens"][i] - (stop - 1 - row)]]
                found[row] = formula(history)
        return found

    def result(self, handle: int) -> tuple[IntArray, FloatArray]:
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


def executor(sequences: int = 4) -> CudaExecutor:
    return CudaExecutor(PROGRAM, PLAN, Formula(), sequences, CONTEXT)


def params(index: int) -> GenerationParams:
    """Greedy, random, penalized and with log-probabilities, in turn."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0.8, "top_k": 9}, {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "logprobs": 2},
    ]  # fmt: skip
    sampling = SamplingParams(seed=index, **kinds[index % 4])
    return GenerationParams(max_tokens=5 + index, sampling=sampling, ignore_eos=True)


def expected(prompt: list[int], chosen: GenerationParams) -> list[int]:
    """The tokens a sequence draws when it is alone on the host."""
    sampler = HostSampler(VOCAB)
    sampler.admit(Admission(0, np.array(prompt), chosen.sampling))
    history = list(prompt)
    for _ in range(chosen.max_tokens or 0):
        history.append(sampler.sample_rows([0], formula(np.array(history))[None])[0].token)
    return history[len(prompt) :]


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("greedy", [True, False])
def test_every_sequence_draws_what_it_draws_alone(ahead: int, greedy: bool) -> None:
    found = executor()
    found.limits = replace(found.limits, steps_in_flight=ahead)
    core = EngineCore(found)
    prompts = [[(7 * i + j) % VOCAB for j in range(1 + 5 * i % 23)] for i in range(9)]
    chosen = [params(4 * i if greedy else i) for i in range(9)]
    ids = [core.add(p, c) for p, c in zip(prompts, chosen)]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    while core.has_work:
        for output in core.step():
            tokens[output.request_id].append(output.sampled.token)
    assert [tokens[i] for i in ids] == [expected(p, c) for p, c in zip(prompts, chosen)]


def test_greedy_steps_bring_no_logits_back() -> None:
    found = executor()
    core = EngineCore(found)
    core.add([1, 2, 3], GenerationParams(max_tokens=4, sampling=SamplingParams(temperature=0), ignore_eos=True))
    while core.has_work:
        core.step()
    assert {rows for _, rows in found.backend.runs} == {0}  # type: ignore[attr-defined]


def admit(seq_id: int, prompt: IntArray, **sampling: Any) -> tuple[Admission, ...]:
    return (Admission(seq_id, prompt, SamplingParams(**{"temperature": 0, **sampling})),)


def test_a_long_prompt_with_all_logits_goes_in_pieces() -> None:
    found, prompt = executor(), np.arange(30) % VOCAB
    row = SeqStep(0, prompt, 0, {"paged": np.arange(8)}, sample=True, logits="all")
    output = found.collect(found.submit(StepBatch((row,), admit=admit(0, prompt))))
    assert np.array_equal(output.logits[0], np.stack([formula(prompt[: i + 1]) for i in range(30)]))
    assert output.sampled[0].token == formula(prompt).argmax()


def test_masks_are_applied_on_the_host() -> None:
    found, prompt = executor(), np.array([5, 6])
    best = int(formula(prompt).argmax())
    mask = np.full(2, 0xFFFFFFFF, np.uint32)
    mask[best // 32] ^= np.uint32(1 << best % 32)
    row = SeqStep(0, prompt, 0, {"paged": np.arange(1)}, sample=True)
    output = found.collect(found.submit(StepBatch((row,), admit=admit(0, prompt), masks={0: mask})))
    assert output.sampled[0].token == int(np.argsort(formula(prompt))[-2])


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
    for seq_id in range(12):
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
