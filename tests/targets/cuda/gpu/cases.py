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

CODED = (
    "llama-int4", "llama-zeros", "llama-int8", "llama-fp8_weights", "llama-fp8", "llama-w8a8", "qwen3-kv_fp8",
    "llama-tied-kv_int8", "mixtral-int4", "gpt_oss-mxfp4", "llama_wide-fp8", "llama_wide-fp8_fast",
    "llama_wide-int4_128", "llama_wide-zeros_64", "llama_wide-kv_fp8", "llama_wide-kv_int8",
    "llama_chain-int4_128", "llama_chain-fp8", "llama_chain-w8a8",
)  # fmt: skip
"""Models over codes: of weights, of activations too, of keys and values, of experts, as stored by a gpt-oss; and one
whose sums are long, with FP8 sums that leave the tensor cores every 128 columns and with fast accumulation, and with
int4 in groups large enough for ``gemm_q_few``; its keys and values lie in blocks that descriptors read. The last decode
one sequence at a time, whose linears are chains."""

WIDE_K = 4096
"""Columns of the longest sums of ``llama_wide``, and of ``test_many_columns`` in the kernel suite."""

FAST_ERROR = WIDE_K / 32 * 2.0**-14
"""What fast accumulation may add to the error of sums of so many columns: each instruction adds 32 columns' products,
keeps some 14 bits of the sum and cuts off the rest, half a unit in the last place on average, always towards zero. A
model's logits hide it: a code that falls to the other side of a rounding moves them by more."""

CONTEXT = 64
LENGTHS = (61, 30, 45)
RUNS = (((40, 1, 20), 4), ((33, 16, 30), 13))
"""How the sequences go in: prompt tokens of each, and rows of a chunk; decodes of some meet chunks of others."""


EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
TRIM = 0.2
"""With experts, rounding decides a router's near ties: some rows run through other experts than in fp32, in the
reference target's bfloat16 as well. This share of the rows of EXPERTS, those that err most, is left out."""


def rms_errors(case: str, found: list[FloatArray], expected: list[FloatArray]) -> npt.NDArray[np.float64]:
    """Each sequence's error, ‖found - expected‖ / ‖expected‖; NaN counts as infinite."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        rows = np.square(a - b, dtype=np.float64).sum(1)
        kept = np.argsort(rows)[: len(rows) - int(TRIM * len(rows)) * (case in EXPERTS)]  # NaN comes last
        total = np.inf if np.isnan(rows).any() else rows[kept].sum()
        errors.append(np.sqrt(total / np.square(b[kept], dtype=np.float64).sum()))
    return np.array(errors, np.float64)
