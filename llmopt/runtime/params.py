"""What a caller may ask of a generation, and its validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmopt.errors import RequestError
from llmopt.launch import MAX_ALTERNATIVES, MAX_BIASES
from llmopt.runtime.protocol import SamplingParams

MAX_LOGPROBS = MAX_ALTERNATIVES
MAX_STOPS = 16
MAX_PRIORITY = 1 << 31


@dataclass(frozen=True)
class Grammar:
    """What a text must look like: a JSON schema, a regular expression, or a context-free grammar (Lark, or GBNF)."""

    kind: Literal["json_schema", "regex", "lark"]
    source: str


@dataclass(frozen=True)
class GenerationParams:
    """One request: how tokens are drawn and when to stop.

    ``max_tokens``: None is "until the context is full"; more than the context leaves is cut to it.
    ``stop``: strings that end the text and are not part of it. ``stop_token_ids``: ids that end it like an
    end-of-sequence token. ``ignore_eos``: the model's own end-of-sequence ids do not end it.
    ``grammar``: tokens that would leave it cannot be drawn, and the text ends where it is complete.
    ``prompt_logprobs``: how many alternatives to report for every prompt token after the first (None: no report).
    ``priority``: lower is served first (as vLLM has it). ``tenant``: whose share of the server it uses.
    ``timeout``: seconds from its arrival to its last token (None: no deadline).
    ``cache_salt``: cached prefixes are shared only between requests of the same salt.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    tenant: str = ""
    timeout: float | None = None
    cache_salt: str = ""


def check_params(params: GenerationParams, vocab_size: int) -> None:
    """Raises RequestError naming the first parameter out of its range."""
    s = params.sampling
    _check("temperature", s.temperature, "at least 0", s.temperature >= 0)
    _check("top_k", s.top_k, "at least 0 (0 is off)", s.top_k >= 0)
    _check("top_p", s.top_p, "in (0, 1]", 0 < s.top_p <= 1)
    _check("min_p", s.min_p, "in [0, 1]", 0 <= s.min_p <= 1)
    _check("repetition_penalty", s.repetition_penalty, "above 0", s.repetition_penalty > 0)
    _check("presence_penalty", s.presence_penalty, "in [-2, 2]", -2 <= s.presence_penalty <= 2)
    _check("frequency_penalty", s.frequency_penalty, "in [-2, 2]", -2 <= s.frequency_penalty <= 2)
    if s.logprobs is not None:
        _check("logprobs", s.logprobs, f"in [0, {MAX_LOGPROBS}]", 0 <= s.logprobs <= MAX_LOGPROBS)
    _check("number of logit_bias tokens", len(s.logit_bias), f"at most {MAX_BIASES}", len(s.logit_bias) <= MAX_BIASES)
    for token, bias in s.logit_bias.items():
        _check("logit_bias token", token, f"in [0, {vocab_size})", 0 <= token < vocab_size)
        _check(f"logit_bias of token {token}", bias, "in [-100, 100]", -100 <= bias <= 100)
    if params.max_tokens is not None:
        _check("max_tokens", params.max_tokens, "at least 1", params.max_tokens >= 1)
    _check("number of stop strings", len(params.stop), f"at most {MAX_STOPS}", len(params.stop) <= MAX_STOPS)
    if "" in params.stop:
        raise RequestError("a stop string is empty")
    for token in params.stop_token_ids:
        _check("stop_token_ids token", token, f"in [0, {vocab_size})", 0 <= token < vocab_size)
    if params.prompt_logprobs is not None:
        good = 0 <= params.prompt_logprobs <= MAX_LOGPROBS
        _check("prompt_logprobs", params.prompt_logprobs, f"in [0, {MAX_LOGPROBS}]", good)
    _check("priority", params.priority, f"in [-{MAX_PRIORITY}, {MAX_PRIORITY}]", abs(params.priority) <= MAX_PRIORITY)
    if params.timeout is not None:
        _check("timeout", params.timeout, "above 0 seconds", params.timeout > 0)


def check_prompt(prompt: Sequence[int], vocab_size: int, context: int) -> None:
    """Raises RequestError for a prompt that is empty, leaves no room for one token, or is not of this vocabulary."""
    if len(prompt) == 0:
        raise RequestError("the prompt is empty", hint="give at least one token")
    if len(prompt) >= context:
        hint = f"at most {context - 1} leave room for one new token"
        raise RequestError(f"the prompt has {len(prompt)} tokens and the context is {context}", hint=hint)
    if bad := next((t for t in prompt if not 0 <= t < vocab_size), None):
        raise RequestError(f"prompt token {bad} is not in [0, {vocab_size})")


def token_budget(params: GenerationParams, prompt_tokens: int, context: int) -> int:
    """New tokens a request may have: ``max_tokens``, cut to what the context leaves."""
    room = context - prompt_tokens
    return room if params.max_tokens is None else min(params.max_tokens, room)


def _check(name: str, value: float, wanted: str, good: bool) -> None:
    if not (good and math.isfinite(value)):
        raise RequestError(f"{name} must be {wanted}, not {value}")
