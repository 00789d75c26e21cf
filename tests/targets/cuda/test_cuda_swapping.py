"""States that go to host memory and come back to other blocks: the kernels go on to the last bit as if they had not."""

from __future__ import annotations

import numpy as np
import pytest

from llmopt.runtime.executors.cuda.executor import CudaExecutor
from llmopt.runtime.protocol import Admission, FloatArray, SamplingParams, SeqStep, StateOp, StepBatch
from targets.cuda.kernels._common import SM_COUNT
from targets.cuda.options import CudaOptions
from targets.cuda.select import discover
from tests.targets.cuda.models import interpreted, model
from tests.targets.cuda.test_cuda_kv_codes import coded

OPTIONS = CudaOptions(decode_buckets=(1,), extend_buckets=(16,), extend_sequences=(4,))
PROMPT, OTHER = np.array([3, 1, 4, 1, 5, 9, 2, 6]), np.array([2, 7, 1, 8, 2, 8])


def prefill(found: CudaExecutor, seq_id: int, prompt: np.ndarray[tuple[int], np.dtype[np.int64]], block: int) -> None:
    """A prompt into a block."""
    row = SeqStep(seq_id, prompt, 0, {"paged": np.array([block])}, sample=True)
    greedy = Admission(seq_id, prompt, SamplingParams(temperature=0))
    found.collect(found.submit(StepBatch((row,), admit=(greedy,))))


def next_logits(found: CudaExecutor, seq_id: int, block: int, *ops: StateOp) -> FloatArray:
    """Logits (V,) of a sequence's next row, its state in ``block``, after state operations."""
    row = SeqStep(seq_id, None, len(PROMPT), {"paged": np.array([block])}, sample=True, logits="last")
    return found.collect(found.submit(StepBatch((row,), ops=ops))).logits[seq_id][0]


@pytest.mark.slow
@pytest.mark.parametrize("states", ["values", "int8"])
def test_a_swapped_state_goes_on_where_it_was(states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences of one prompt: one stays, one is swapped while another takes its block, one reads that block."""
    monkeypatch.setitem(SM_COUNT, 90, 8)
    of_codes = states == "int8"
    what = coded("llama-tied", states) if of_codes else model("llama")
    found, none = interpreted(what, discover(), OPTIONS), np.zeros(0, np.int64)
    assert {state.dtype == "int8" for group in found.state_plan.groups for state in group.states} == {of_codes}
    for seq_id in range(3):
        prefill(found, seq_id, PROMPT, seq_id)
    found.collect(found.submit(StepBatch((), ops=(StateOp("swap_out", "paged", np.array([1]), none, key=7),))))
    prefill(found, 3, OTHER, 1)
    stays = next_logits(found, 0, 0)
    assert np.array_equal(next_logits(found, 1, 3, StateOp("swap_in", "paged", none, np.array([3]), key=7)), stays)
    assert not np.array_equal(next_logits(found, 2, 1), stays)
