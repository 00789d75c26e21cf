"""The repository's kernels in Triton's interpreter, against the reference target."""

from __future__ import annotations

import pytest

from targets.cuda.select import discover
from tests.targets.cuda.models import interpreted, model, reference
from tests.targets.cuda.test_cuda_plan import TOLERANCE, logits
from tests.targets.models import worst

SERVED = ("llama-tied", "qwen3", "gemma2", "gpt2", "phi3-longrope", "gpt_oss")
"""One of each kind of norm, rotation, window, softcap, sinks and experts: the interpreter takes some 20 s a model."""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SERVED)
def test_kernels_compute_what_the_reference_computes(architecture: str) -> None:
    found = model(architecture)
    expected = logits(reference(found), found)
    assert worst(logits(interpreted(found, discover()), found), expected) <= TOLERANCE
