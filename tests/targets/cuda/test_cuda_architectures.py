"""The repository's kernels in Triton's interpreter: every architecture they serve against the reference target."""

from __future__ import annotations

import pytest

from llmopt.errors import TargetError
from targets.cuda.select import discover
from tests.architectures import ARCHITECTURES
from tests.targets.cuda.models import interpreted, model, reference
from tests.targets.cuda.test_cuda_plan import TOLERANCE, logits
from tests.targets.models import worst

UNSERVED = {"mixtral", "qwen3_moe", "gpt_oss"}
"""Experts and their routing have no kernels yet: the build must say so."""
SERVED = [name for name in ARCHITECTURES if name not in UNSERVED]


@pytest.mark.parametrize("architecture", SERVED)
def test_kernels_compute_what_the_reference_computes(architecture: str) -> None:
    found = model(architecture)
    expected = logits(reference(found), found)
    assert worst(logits(interpreted(found, discover()), found), expected) <= TOLERANCE


@pytest.mark.parametrize("architecture", sorted(UNSERVED))
def test_what_no_kernel_serves_is_named(architecture: str) -> None:
    with pytest.raises(TargetError, match="no kernel serves"):
        interpreted(model(architecture), discover())
