"""The executor: idle slots, state operations, limits, refusals, sampling, the golden gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmopt.errors import ExecutorError, ResourceError
from llmopt.registry import load_executor_module
from llmopt.runtime.executors.onnxruntime import COPY_FILE, OnnxruntimeExecutor
from llmopt.runtime.executors.onnxruntime_calls import MAX_GAP, runs
from llmopt.runtime.executors.onnxruntime_session import check_version
from llmopt.runtime.executors.onnxruntime_state import DeviceMemory, HostMemory
from llmopt.runtime.golden import check_golden
from llmopt.runtime.protocol import Admission, SamplingParams, SeqStep, StateOp, StepBatch, StepOutput
from llmopt.target import LoadOptions
from tests.targets.onnxruntime.attention import CONTEXT, Attention
from tests.targets.onnxruntime.build import OPTIONS, build, executor

LAYER = Attention(window=9, softcap=3.0, fused=True)
CODED = replace(LAYER, codes=True)
PROGRAM, WEIGHTS = LAYER.program(), LAYER.readers()
GREEDY = SamplingParams(temperature=0)


def reference(layer: Attention = LAYER) -> Any:
    return load_executor_module("reference").ReferenceExecutor(layer.program(), layer.tensors(), OPTIONS)


def row(seq_id: int, slot: int, start: int, tokens: Any, **options: Any) -> SeqStep:
    given = None if tokens is None else np.asarray(tokens, np.int64)
    return SeqStep(seq_id, given, start, {"slots": np.array([slot])}, **{"logits": "all", **options})


def admit(*seq_ids: int) -> tuple[Admission, ...]:
    return tuple(Admission(i, np.array([3, 1]), GREEDY) for i in seq_ids)


def play(runner: Any, batches: list[StepBatch]) -> list[StepOutput]:
    return [runner.collect(runner.submit(batch)) for batch in batches]


def assert_same(batches: list[StepBatch], runner: Any = None, layer: Attention = LAYER) -> None:
    """Both executors of a layer give the same logits and samples, step by step."""
    found = play(runner or executor(layer.program(), layer.readers()), batches)
    wanted = play(reference(layer), batches)
    for a, b in zip(found, wanted, strict=True):
        assert a.sampled == b.sampled
        assert a.logits.keys() == b.logits.keys()
        for seq_id, logits in b.logits.items():
            np.testing.assert_allclose(a.logits[seq_id], logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def op(kind: Any, source: list[int], target: list[int], **more: int) -> StateOp:
    return StateOp(kind, "slots", np.array(source, np.int64), np.array(target, np.int64), **more)


def prompts(*slots: int) -> StepBatch:
    """A prompt of 5 + slot tokens in each slot, by sequences of the slot's number."""
    return StepBatch(tuple(row(s, s, 0, np.arange(5 + s) + 2 * s) for s in slots), admit=admit(*slots))


def test_idle_slots_keep_their_state() -> None:
    """Slots 1 and 2 lie inside the range of decode calls they take no part in, slot 2 full to its last position."""
    full = StepBatch((row(2, 2, 0, np.arange(CONTEXT)),), admit=admit(2))
    decodes = [StepBatch((row(0, 0, 5 + i, [i]), row(3, 3, 8 + i, [7 * i]))) for i in range(4)]
    after = [StepBatch((row(1, 1, 6, [9]),)), StepBatch((row(2, 2, CONTEXT - 1, [5]),))]
    assert_same([prompts(0, 1, 3), full, *decodes, *after])


def test_an_idle_row_would_damage_a_slot_of_unknown_length() -> None:
    """Negative control: with the lengths forgotten, the same traffic does damage."""
    runner = executor(PROGRAM, WEIGHTS)
    play(runner, [prompts(0, 1, 3)])
    runner.states.lengths[1] = 2
    play(runner, [StepBatch((row(0, 0, 5, [0]), row(3, 3, 8, [0])))])
    last = StepBatch((row(1, 1, 6, [9]),))
    found, wanted = play(runner, [last]), play(reference(), [prompts(1), last])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found[0].logits[1], wanted[1].logits[1], rtol=1e-4)


OPERATIONS = {
    "copy": [op("copy", [0], [2])],
    "move": [op("move", [1], [3])],
    "exchange": [op("move", [0, 1], [1, 0])],
    "swap": [op("swap_out", [0], [], key=7), op("swap_in", [], [3], key=7)],
    "swap over": [op("swap_out", [0], [], key=7), op("copy", [1], [0]), op("swap_in", [], [1], key=7)],
    "truncate": [op("truncate", [0], [], length=3)],
}


@pytest.mark.parametrize("layer", [LAYER, CODED], ids=["numbers", "codes"])
@pytest.mark.parametrize("device_memory", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_state_operations(name: str, device_memory: bool, layer: Attention) -> None:
    """The next rows of every touched slot see what the reference sees; device copies run through the copy model."""
    runner = executor(layer.program(), layer.readers())
    if device_memory:
        use_device_memory(runner, layer)
    check_state_operation(name, runner, layer)


def check_state_operation(name: str, runner: OnnxruntimeExecutor, layer: Attention = LAYER) -> None:
    """An executor of the layer gives what the reference gives after an operation."""
    start = {"truncate": 3}.get(name, 5)
    slot = {"copy": 2, "move": 3, "exchange": 1, "swap": 3, "swap over": 1, "truncate": 0}[name]
    length = 6 if name == "move" else start
    step = StepBatch((row(8, slot, length, [4]),), admit=admit(8), ops=tuple(OPERATIONS[name]))
    again = StepBatch((row(8, slot, length + 1, [2, 6, 1]),))
    assert_same([prompts(0, 1), step, again], runner, layer)


def use_device_memory(runner: OnnxruntimeExecutor, layer: Attention = LAYER) -> None:
    """Give an executor the memory class of accelerators, here on the CPU provider."""
    states, copier = runner.states, build(layer.program(), layer.readers()).files[COPY_FILE]
    states.memory = DeviceMemory(states.shapes, states.dtype, copier, OPTIONS)
    runner.context.bindings.clear()


def test_both_memories_move_the_same_bytes() -> None:
    shapes = {"k_0": (3, 2, 5, 4), "v_0": (3, 2, 5, 4)}
    host = HostMemory(shapes, "float32")
    device = DeviceMemory(shapes, "float32", build(PROGRAM, WEIGHTS).files[COPY_FILE], OPTIONS)
    values = [np.random.default_rng(i).random((1, 2, 5, 4), np.float32) for i in range(2)]
    for memory in (host, device):
        memory.write(1, values)
        memory.copy(1, 2, 3)  # three tokens of five
        for slot, tokens in ((1, 5), (2, 3)):
            for found, wanted in zip(memory.read(slot), values, strict=True):
                np.testing.assert_array_equal(found[:, :, :tokens], wanted[:, :, :tokens])


def test_state_operations_out_of_range() -> None:
    runner = executor(PROGRAM, WEIGHTS)
    with pytest.raises(ExecutorError, match="outside"):
        runner.submit(StepBatch((), ops=(op("copy", [0], [4]),)))
    with pytest.raises(ExecutorError, match="never swapped out"):
        runner.submit(StepBatch((), ops=(op("swap_in", [], [1], key=3),)))


def test_explicit_positions_are_used() -> None:
    later = row(0, 0, 5, [4], positions=np.array([11]))
    chunk = row(1, 1, 6, [4, 2, 8], positions=np.array([8, 9, 10]))
    assert_same([prompts(0, 1), StepBatch((later, chunk))])


def test_greedy_generation_and_rows_without_logits() -> None:
    first = StepBatch((row(0, 0, 0, [3, 1], logits="none", sample=True), row(1, 2, 0, [5], logits="none")),
                      admit=admit(0, 1))  # fmt: skip
    rest = [StepBatch((row(0, 0, 2 + i, None, logits="none", sample=True),)) for i in range(5)]
    quiet = StepBatch((row(1, 2, 1, [5, 6, 7], logits="none"),))
    assert_same([first, *rest, quiet, StepBatch((), release=(0, 1))])


def test_decode_calls_split_at_long_gaps() -> None:
    gap = MAX_GAP + 1
    assert runs([(0, 0), (gap, 1)]) != runs([(0, 0), (gap + 1, 1)])
    assert [len(r) for r in runs([(0, 0), (1, 1), (gap + 2, 2), (gap + 3, 3)])] == [2, 2]
    assert list(runs([])) == []


def test_limits_follow_the_options() -> None:
    slot = 2 * 2 * 16 * 4 * (CONTEXT + 1)
    runner = executor(PROGRAM, WEIGHTS, replace(OPTIONS, kv_bytes=3 * slot - 1, max_sequences=8))
    assert (runner.limits.max_sequences, dict(runner.limits.blocks)) == (2, {"slots": 2})
    assert executor(PROGRAM, WEIGHTS, replace(OPTIONS, max_context=20)).limits.max_context == 20
    with pytest.raises(ResourceError, match="needs"):
        executor(PROGRAM, WEIGHTS, replace(OPTIONS, kv_bytes=slot - 1))


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu", "cpu:x"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ResourceError, match=r"CUDAExecutionProvider|no device"):
        executor(PROGRAM, WEIGHTS, replace(OPTIONS, device=device))


def test_versions_that_compute_windows_wrongly_are_refused() -> None:
    for version in ("1.23.2", "1.9.0", "0.5"):
        with pytest.raises(ResourceError, match="too old"):
            check_version(version)
    for version in ("1.24.0", "1.32.0", "2.0.1"):
        check_version(version)


def test_rows_the_program_cannot_run() -> None:
    runner = executor(PROGRAM, WEIGHTS)
    for wrong, match in (
        (row(0, 0, CONTEXT - 1, [1, 2]), "past the context"),
        (row(0, 0, 0, [1, 2], tree=np.ones((2, 2), bool)), "tree"),
        (row(0, 0, 0, [1], positions=np.array([CONTEXT + 5])), "past the context"),
    ):
        with pytest.raises(ExecutorError, match=match):
            runner.submit(StepBatch((wrong,), admit=admit(0)))
    with pytest.raises(ExecutorError, match="never submitted"):
        runner.collect(99)


def test_a_damaged_model_is_an_executor_error() -> None:
    files = build(PROGRAM, WEIGHTS)
    with pytest.raises(ExecutorError, match="refused"):
        OnnxruntimeExecutor(PROGRAM, b"\x08\x09not onnx", files.files[COPY_FILE], NoWeights(), LoadOptions(threads=1))


class NoWeights:
    """An empty store."""

    def names(self) -> tuple[str, ...]:
        return ()

    def get(self, name: str) -> Any:
        raise KeyError(name)

    def dtype(self, name: str) -> str:
        raise KeyError(name)


def golden() -> list[dict[str, Any]]:
    """What the reference generates from two prompts."""
    entries = []
    for prompt in ([3, 1, 4, 1, 5], [9, 2, 6]):
        runner, tokens, margins = reference(), [], []
        fed = list(prompt)
        runner.submit(StepBatch((), admit=admit(0)))
        for _ in range(6):
            new = fed if not tokens else fed[-1:]
            logits = play(runner, [StepBatch((row(0, 0, len(fed) - len(new), new, logits="last"),))])[0].logits[0][-1]
            tokens.append(int(logits.argmax()))
            margins.append(float(np.diff(np.sort(logits)[-2:])[0]))
            fed.append(tokens[-1])
        entries.append({"prompt": prompt, "tokens": tokens, "margins": margins})
    return entries


def test_the_golden_gate() -> None:
    entries: Any = golden()
    runner = executor(PROGRAM, WEIGHTS)
    assert check_golden(runner, entries, dtype="float32") == 12
    assert check_golden(runner, entries, dtype="float32") == 12  # and it leaves nothing behind
    wrong = [entries[0], {**entries[1], "tokens": [*entries[1]["tokens"][:3], 1, *entries[1]["tokens"][4:]]}]
    with pytest.raises(ExecutorError, match="golden tokens differ"):
        check_golden(runner, wrong, dtype="float32")
    tied: Any = [{**wrong[1], "margins": [0.0] * 6}]
    assert check_golden(executor(PROGRAM, WEIGHTS), tied, dtype="float32") == 0


@pytest.mark.parametrize("change", [{"window": 4}, {"softcap": 0.5}, {"fused": False, "mixed": True}], ids=str)
def test_the_golden_gate_catches_a_wrong_model(change: dict[str, Any]) -> None:
    wrong = replace(LAYER, **change)
    entries: Any = golden()
    with pytest.raises(ExecutorError, match="golden tokens differ"):
        check_golden(executor(wrong.program(), wrong.readers()), entries, dtype="float32")
