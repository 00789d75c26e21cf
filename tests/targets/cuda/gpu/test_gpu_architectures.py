"""Every architecture on the GPU against the reference target in fp32: ragged batches over shuffled, poisoned pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmopt.artifact import Artifact
from llmopt.runtime.executors.cuda import load
from llmopt.runtime.executors.cuda.driver import call
from llmopt.runtime.protocol import FloatArray, SeqStep, StepBatch
from llmopt.target import LoadOptions
from tests.targets.cuda.gpu.cases import CASES, CODED, CONTEXT, LENGTHS, RUNS, rms_errors
from tests.targets.ragged import RaggedDriver

pytestmark = pytest.mark.gpu
SLACK = 1.5
"""The reference target's own error in bfloat16 against fp32, times this, is what another order of sums may cost."""


def poisoned(artifact: Path) -> Any:
    """The executor with every page of its states full of NaN."""
    executor = load(Artifact.open(artifact), LoadOptions("cuda", max_sequences=4, max_context=CONTEXT))
    backend: Any = executor.backend
    call("cuMemsetD8Async", backend.kv, 0xFF, backend.states.size, backend.stream)
    return executor


def expected(folder: Path, case: str) -> Any:
    """Tokens, fp32 logits, and the errors of the reference in bfloat16."""
    return np.load(folder / f"{case}.npz")


def errors(folder: Path, case: str, run: int, shift: int = 0) -> npt.NDArray[np.float64]:
    """Each sequence's error on the GPU."""
    executor, wanted = poisoned(folder / case), expected(folder, case)
    tokens = [wanted[f"tokens_{i}"] for i in range(len(LENGTHS))]
    prompts, chunk = RUNS[run]
    try:
        found: list[FloatArray] = RaggedDriver(executor, seed=run, shift=shift).logits(tokens, list(prompts), chunk)
    finally:
        executor.close()
    return rms_errors(case, found, [wanted[f"logits_{run}_{i}"] for i in range(len(LENGTHS))])


def tolerance(folder: Path, case: str, run: int) -> float:
    """Largest error of a sequence."""
    return SLACK * float(expected(folder, case)[f"rms_{run}"].max())


@pytest.mark.parametrize("run", range(len(RUNS)))
@pytest.mark.parametrize("case", CASES + CODED)
def test_logits_are_as_near_to_fp32_as_bfloat16_is(case: str, run: int, artifacts: Path) -> None:
    found, limit = errors(artifacts, case, run), tolerance(artifacts, case, run)
    print(f"{case} run {run}: {found.round(5)} of {limit:.5f}")
    assert found.max() <= limit


@pytest.mark.parametrize(("case", "shift"), [("llama", 16), ("gpt2", 1)])
def test_a_shifted_position_is_caught(case: str, shift: int, artifacts: Path) -> None:
    assert errors(artifacts, case, 0, shift).max() > 2 * tolerance(artifacts, case, 0)


@pytest.mark.parametrize("case", ["llama", "mixtral-empty"])
def test_the_logits_of_another_model_are_told_apart(case: str, artifacts: Path) -> None:
    """The control of the tolerance: one weight matrix of the last layer a tenth too large."""
    executor, wanted = poisoned(artifacts / case), expected(artifacts, case)
    backend: Any = executor.backend
    name = next(n for n in reversed(executor.program.weights) if n.endswith(("down_proj.weight", "down_proj")))
    kind = executor.program.weights[name].type
    data = np.ascontiguousarray(Artifact.open(artifacts / case).weight_store().get(name))
    larger = (data.astype(np.float32) * 1.1).astype(data.dtype)
    assert kind.dtype == "bfloat16"
    call("cuMemcpyHtoD", backend.weights + backend.where.weights.offsets[name], larger.ctypes.data, larger.nbytes)
    tokens = [wanted[f"tokens_{i}"] for i in range(len(LENGTHS))]
    found = RaggedDriver(executor).logits(tokens, list(RUNS[0][0]), RUNS[0][1])
    executor.close()
    exact = [wanted[f"logits_0_{i}"] for i in range(len(LENGTHS))]
    assert rms_errors(case, found, exact).max() > tolerance(artifacts, case, 0)


def test_poison_in_pages_in_use_shows(artifacts: Path) -> None:
    """The control of the poison."""
    executor, tokens = poisoned(artifacts / "llama"), expected(artifacts, "llama")["tokens_0"]
    backend: Any = executor.backend
    RaggedDriver(executor).logits([tokens[:20]], [19], 19)
    call("cuMemsetD8Async", backend.kv, 0xFF, backend.states.size, backend.stream)
    tables = {g.name: np.array([0, 1], np.int64) for g in executor.state_plan.groups}
    row = SeqStep(0, tokens[20:21], 20, tables, logits="all")
    logits = executor.collect(executor.submit(StepBatch((row,)))).logits[0]
    executor.close()
    assert np.isnan(logits).all()
