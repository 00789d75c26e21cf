"""The repository's kernels in Triton's interpreter, against the reference target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmopt.runtime.protocol import FloatArray
from targets.cuda.kernels._common import SM_COUNT
from targets.cuda.options import CudaOptions
from targets.cuda.select import discover
from tests.targets.cuda.models import interpreted, model, reference
from tests.targets.cuda.test_cuda_plan import TOLERANCE
from tests.targets.models import worst
from tests.targets.ragged import RaggedDriver

SERVED = ("llama-tied", "qwen3", "gemma2", "gpt2", "phi3-longrope", "gpt_oss")
"""One of each kind of norm, rotation, window, softcap, sinks and experts: the interpreter takes some 7 s a model."""

OPTIONS = CudaOptions(decode_buckets=(4,), extend_buckets=(16,), extend_sequences=(4,))
LENGTHS, PROMPTS, CHUNK = (26, 4, 7), (24, 1, 4), 12
"""Eight steps: chunks beside decodes, past the windows, and past the length at which longrope switches."""


def logits(executor: Any, vocab_size: int) -> list[FloatArray]:
    """Of random sequences."""
    return driven(executor, vocab_size, LENGTHS, PROMPTS, CHUNK)


def few_logits(executor: Any, vocab_size: int) -> list[FloatArray]:
    """The same in five steps, for what length makes no difference to: chunks, and one beside a decode."""
    return driven(executor, vocab_size, (8, 5), (7, 3), 4)


def driven(
    executor: Any, vocab_size: int, lengths: tuple[int, ...], prompts: tuple[int, ...], chunk: int
) -> list[FloatArray]:
    random = np.random.default_rng(0)
    tokens = [random.integers(0, vocab_size, n).astype(np.int64) for n in lengths]
    return RaggedDriver(executor).logits(tokens, list(prompts), chunk)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SERVED)
def test_kernels_compute_what_the_reference_computes(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SM_COUNT, 90, 8)  # a full GPU's splits of the keys are three quarters of the time
    found = model(architecture)
    vocab_size = found.program.vocab_size
    expected = logits(reference(found), vocab_size)
    assert worst(logits(interpreted(found, discover(), OPTIONS), vocab_size), expected) <= TOLERANCE
