"""Plan, kernels, memory planning and executor together, on the CPU, against the reference interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmopt.launch import TensorMap
from llmopt.program import OpCall
from llmopt.runtime.protocol import FloatArray, IntArray
from targets.cuda.feedback import DRAWN, REPORTS
from targets.cuda.kernel import KernelLaunch, Specialization, Strided, TmaOperand
from targets.cuda.plan import BucketPlan, PlannedLaunch, place
from tests.targets.cuda.models import Model, interpreted, model, reference
from tests.targets.cuda.simple import KERNELS
from tests.targets.models import worst
from tests.targets.ragged import RaggedDriver

LENGTHS, PROMPTS = (22, 9, 14), (17, 1, 6)
TOLERANCE = 8 * 2.0**-8
"""bfloat16 keeps 8 bits: 2^-8 a rounding; the two paths sum in another order, and a dozen roundings follow."""


def sequences(vocab_size: int) -> list[IntArray]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, n).astype(np.int64) for n in LENGTHS]


def logits(executor: object, found: Model, shift: int = 0) -> list[FloatArray]:
    driver = RaggedDriver(executor, shift=shift)  # type: ignore[arg-type]
    return driver.logits(sequences(found.program.vocab_size), list(PROMPTS))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_a_plan_computes_what_the_reference_computes(architecture: str) -> None:
    found = model(architecture)
    expected = logits(reference(found), found)
    assert worst(logits(interpreted(found, KERNELS), found), expected) <= TOLERANCE


@pytest.mark.parametrize(("buffer", "rows"), [("x", 128), ("weight", 96)])
def test_rows_to_spare_lie_in_the_arena(buffer: str, rows: int) -> None:
    """A descriptor of 96 rows in boxes of 64 reads 128 of the arena, which reaches as far; of weights it reads 96."""
    x = Strided(buffer, "bfloat16", (96, 64), (64, 1))
    plan = bucket_of(TmaOperand(x, (64, 64), spare=True))
    found = place(plan, 256, lambda spec: spec.function)
    (moved,) = (arg for launch in found.launches for arg in launch.args if isinstance(arg, TensorMap))
    assert moved.shape == (rows, 64)
    held = 256 + sum(plan.buffers.values())
    assert found.arena_bytes == (max(held, found.offsets["x"] + 128 * 64 * 2) if rows == 128 else held)
    kept = place(bucket_of(TmaOperand(x, (64, 64))), 256, lambda spec: spec.function)
    assert kept.arena_bytes == held, "rows that are written stay where they are"


def bucket_of(operand: TmaOperand) -> BucketPlan:
    """A bucket of one launch, whose x of 96 rows is all that the arena holds."""
    function = model("llama").program.functions["decode"]
    call = OpCall("test", {}, ("x",))
    spec = Specialization("module", "function", (("x", "tensordesc<bf16[64, 64]>"),), ())
    launch = PlannedLaunch(KernelLaunch(spec, (1, 1, 1), (operand,)), call, 0)
    x = Strided("x", "bfloat16", (96, 64), (64, 1))
    plan = BucketPlan(function, {"T": 2, "N": 2, "M": 2, "W": 1}, [launch], {"x": 96 * 64 * 2}, {}, {})
    plan.outputs = dict.fromkeys(("logits", DRAWN, REPORTS), x)
    return replace(plan, function=replace(function, inputs=()))
