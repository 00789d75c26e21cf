"""Plan, kernels, memory planning and executor together, on the CPU, against the reference interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from llmopt.runtime.protocol import FloatArray, IntArray
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
