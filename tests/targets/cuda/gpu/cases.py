"""What the GPU tests and the script that builds for them agree on (numpy only)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmopt.runtime.protocol import FloatArray

CASES = (
    "llama", "llama-tied", "llama-llama3", "llama-linear", "llama-dynamic", "llama-yarn", "qwen2", "qwen3", "mistral",
    "gemma2", "gemma3", "phi3", "phi3-longrope", "gpt2", "opt", "gpt_neox", "stablelm", "olmo2", "granite",
    "starcoder2", "smollm3", "cohere2", "mixtral", "qwen3_moe", "gpt_oss",
    "mixtral-skewed", "mixtral-empty", "qwen3_moe-skewed", "qwen3_moe-empty",
)  # fmt: skip
"""Every architecture of the conformance suite, and expert routers under uneven loads."""

CONTEXT = 64
LENGTHS = (61, 30, 45)
RUNS = (((40, 1, 20), 4), ((33, 16, 30), 13))
"""How the sequences go in: prompt tokens of each, and rows of a chunk; decodes of some meet chunks of others."""


def rms_errors(found: list[FloatArray], expected: list[FloatArray]) -> npt.NDArray[np.float64]:
    """Each sequence's error, ‖found - expected‖ / ‖expected‖; NaN counts as infinite."""
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, expected, strict=True)]
    return np.nan_to_num(np.array(errors, np.float64), nan=np.inf)
