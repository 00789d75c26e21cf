"""What the device must know to draw a sequence's tokens, and what it reports (numpy only)."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.errors import RequestError
from llmopt.launch import MAX_ALTERNATIVES, MAX_BIASES, RECORD_WORDS, SAMPLING_RECORD
from llmopt.runtime.protocol import Admission, Sampled, SamplingParams

RECORD = np.dtype(
    {
        "names": list(SAMPLING_RECORD),
        "formats": [dtype for _, dtype in SAMPLING_RECORD.values()],
        "offsets": [4 * word for word, _ in SAMPLING_RECORD.values()],
        "itemsize": 4 * RECORD_WORDS,
    }
)
"""A sampling record as numpy sees it."""

COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures that fp32 can invert; beyond them a draw is a largest entry, or even."""

MOST_COUNTED = 16382
"""Times a token is counted at most, in int16 with one bit for the prompt."""


def is_greedy(params: SamplingParams) -> bool:
    """Whether a sequence's tokens are nothing but the largest logit's, and nothing is to be reported."""
    return params.temperature == 0 and not (has_penalties(params) or params.logit_bias or params.logprobs is not None)


def has_penalties(params: SamplingParams) -> bool:
    """Whether the tokens so far matter."""
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)


def place_rows(admission: Admission, vocab_size: int) -> dict[str, npt.NDArray[Any]]:
    """The start of a sequence place's row in each persistent buffer that matters to the sequence.

    Raises RequestError for more biases or alternatives than the device has room for.
    """
    params = admission.sampling
    if len(params.logit_bias) > MAX_BIASES:
        raise RequestError(f"at most {MAX_BIASES} tokens can be biased, not {len(params.logit_bias)}")
    if (params.logprobs or 0) > MAX_ALTERNATIVES:
        raise RequestError(f"at most {MAX_ALTERNATIVES} alternatives can be reported, not {params.logprobs}")
    rows: dict[str, npt.NDArray[Any]] = {"records": record(params)}
    if params.logit_bias:
        rows["bias_ids"] = np.array(list(params.logit_bias), np.int32)
        rows["bias_values"] = np.array(list(params.logit_bias.values()), np.float32)
    if has_penalties(params):
        rows["history"] = counts(admission, vocab_size)
    return rows


def record(params: SamplingParams) -> npt.NDArray[np.int32]:
    """The sampling record (RECORD_WORDS,) int32 of a place."""
    heat = min(max(params.temperature, COLDEST), HOTTEST) if params.temperature > 0 else 0.0
    fields = {
        "temperature": heat,
        "inverse_temperature": 1 / heat if heat else 1.0,
        "min_p": params.min_p,
        "top_k": min(params.top_k, 2**31 - 1),
        "repetition": params.repetition_penalty,
        "presence": params.presence_penalty,
        "frequency": params.frequency_penalty,
        "logprobs": -1 if params.logprobs is None else params.logprobs,
        "biases": len(params.logit_bias),
        "seed": secrets.randbits(64) if params.seed is None else params.seed & (2**64 - 1),
        "top_p": params.top_p,
    }
    return np.array([tuple(fields[name] for name in SAMPLING_RECORD)], RECORD).view(np.int32)


def counts(admission: Admission, vocab_size: int) -> npt.NDArray[np.int16]:
    """(V,) twice the times each token was drawn, plus one if the prompt holds it."""
    drawn = np.minimum(np.bincount(admission.output, minlength=vocab_size), MOST_COUNTED)
    found = (2 * drawn).astype(np.int16)
    found[admission.prompt] |= 1
    return found


def reported(token: int, row: npt.NDArray[np.int32], alternatives: int, vocab_size: int) -> Sampled:
    """A drawn token with the log-probabilities in its row (REPORT_WORDS,) of the report."""
    floats = row.view(np.float32)
    count = min(alternatives, vocab_size)
    ids, values = row[1 : 1 + count], floats[1 + MAX_ALTERNATIVES : 1 + MAX_ALTERNATIVES + count]
    return Sampled(token, float(floats[0]), tuple(zip(ids.tolist(), values.tolist())))
