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
from llmopt.runtime.protocol import FloatArray
from llmopt.target import LoadOptions
from tests.targets.cuda.gpu.cases import CASES, CONTEXT, LENGTHS, RUNS, rms_errors
from tests.targets.ragged import RaggedDriver

pytestmark = pytest.mark.gpu
SLACK = 1.5
"""The reference target's own error in bfloat16 against fp32, times this, is what another order of sums may cost."""

EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
FLIP = 0.05
"""With experts a router's near tie falls to the other side now and then, in the reference as well: then a token runs
through another expert. Uneven routers, which leave no ties, are held to SLACK."""


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
    return rms_errors(found, [wanted[f"logits_{i}"] for i in range(len(LENGTHS))])


def tolerance(folder: Path, case: str) -> float:
    """Largest error of a sequence."""
    own = SLACK * float(expected(folder, case)["rms"].max())
    return max(own, FLIP) if case in EXPERTS else own


@pytest.mark.parametrize("run", range(len(RUNS)))
@pytest.mark.parametrize("case", CASES)
def test_logits_are_as_near_to_fp32_as_bfloat16_is(case: str, run: int, artifacts: Path, record_property: Any) -> None:
    found = errors(artifacts, case, run)
    record_property("rms", found.tolist())
    print(f"{case} run {run}: {found} of {tolerance(artifacts, case):.4f}")
    assert found.max() <= tolerance(artifacts, case)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_shifted_position_is_caught(case: str, artifacts: Path) -> None:
    assert errors(artifacts, case, 0, shift=1).max() > 10 * tolerance(artifacts, case)


def test_the_poison_is_where_pages_are(artifacts: Path) -> None:
    """The control of the poison: NaN written over pages in use must show."""
    executor, wanted = poisoned(artifacts / "llama"), expected(artifacts, "llama")
    backend: Any = executor.backend
    driver = RaggedDriver(executor)
    driver.logits([wanted["tokens_0"][:20]], [19], 19)
    call("cuMemsetD8Async", backend.kv, 0xFF, backend.states.size, backend.stream)
    spoiled = driver._row(0, wanted["tokens_0"], 20, 21, {g.name: [0, 1] for g in executor.state_plan.groups})
    from llmopt.runtime.protocol import StepBatch

    logits = executor.collect(executor.submit(StepBatch((spoiled,)))).logits[0]
    executor.close()
    assert np.isnan(logits).all()
