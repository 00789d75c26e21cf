"""The cuda executor, step by step: buckets, places, state operations, faults, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmopt.errors import ExecutorError, RequestError, ResourceError
from llmopt.launch import (
    MAX_ALTERNATIVES,
    MAX_BIASES,
)
from llmopt.program import StatePlan, StateSpec
from llmopt.runtime.executors.cuda.layout import Budget, describe_states, size_blocks
from llmopt.runtime.executors.cuda.steps import Buckets
from llmopt.runtime.protocol import (
    SeqStep,
    StateOp,
    StepBatch,
)
from tests.runtime.cuda_formula import (
    BLOCK,
    CONTEXT,
    GROUP,
    PLACES,
    PLAN,
    VOCAB,
    admit,
    executor,
    formula,
)


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


def test_a_long_prompt_with_all_logits_goes_in_pieces() -> None:
    found, prompt = executor(), np.arange(30) % VOCAB
    row = SeqStep(0, prompt, 0, {"paged": np.arange(8)}, sample=True, logits="all")
    output = found.collect(found.submit(StepBatch((row,), admit=admit(0, prompt))))
    assert np.array_equal(output.logits[0], np.stack([formula(prompt[: i + 1]) for i in range(30)]))
    assert output.sampled[0].token == formula(prompt).argmax()


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
