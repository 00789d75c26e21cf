"""The repository's kernels in Triton's interpreter, against the reference target."""

from __future__ import annotations

import pytest

from llmopt.errors import TargetError
from targets.cuda.select import discover
from tests.targets.cuda.models import interpreted, model, reference
from tests.targets.cuda.test_cuda_plan import TOLERANCE, logits
from tests.targets.models import worst

SERVED = ("llama-tied", "qwen3", "gemma2", "gpt2", "phi3-longrope")
"""One of each kind of norm, rotation, window and softcap: the interpreter takes some 20 s a model."""
UNSERVED = ("mixtral", "gpt_oss")
"""Experts and their routing have no kernels yet: the build must say so."""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SERVED)
def test_kernels_compute_what_the_reference_computes(architecture: str) -> None:
    found = model(architecture)
    expected = logits(reference(found), found)
    assert worst(logits(interpreted(found, discover()), found), expected) <= TOLERANCE


@pytest.mark.parametrize("architecture", UNSERVED)
def test_what_no_kernel_serves_is_named(architecture: str) -> None:
    with pytest.raises(TargetError, match="no kernel serves"):
        interpreted(model(architecture), discover())
