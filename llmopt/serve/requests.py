"""Request bodies of the OpenAI API, read strictly: no field is silently ignored that would change the answer."""

from __future__ import annotations

import difflib
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import SamplingParams
from llmopt.serve.errors import ApiError

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Known fields this server cannot honour, with the values that ask for nothing (as null always does)."""

IGNORED = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})
"""Fields for the provider's books: they never change an answer."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """``include_usage``: a last chunk with token counts."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Message(_Strict):
    """One message of a conversation; content is text or text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, Any]:
        """The message for a chat template; ``developer`` is the newer word for ``system``."""
        named = {"name": self.name} if self.name is not None else {}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "" if self.content is None else self.content, **named}


class GenerationRequest(_Strict):
    """What both endpoints share. top_k, min_p, repetition_penalty, stop_token_ids and ignore_eos go beyond OpenAI."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @property
    def choices(self) -> int:
        """Choices a prompt asks for."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def token_limit(self) -> int | None:
        """Most new tokens; None is until the context is full."""
        return self.max_tokens

    def alternatives(self) -> int | None:
        """Log-probabilities asked for: None, or the number of alternatives."""
        return None

    def params(self, choice: int = 0) -> GenerationParams:
        """Parameters of one choice: choice i of a seeded request draws with seed + i."""
        sampling = SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0) if self.top_k != -1 else 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_logit_bias(self.logit_bias or {}),
            seed=None if self.seed is None else self.seed + choice,
            logprobs=self.alternatives(),
        )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return GenerationParams(
            sampling, self.token_limit(), stop, tuple(self.stop_token_ids or ()), bool(self.ignore_eos)
        )


class CompletionRequest(GenerationRequest):
    """/v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None

    def token_limit(self) -> int | None:
        """OpenAI's default for completions is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    def alternatives(self) -> int | None:
        """``logprobs`` itself."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(p, int) for p in self.prompt):
            return [[p for p in self.prompt if isinstance(p, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]


class ChatRequest(GenerationRequest):
    """/v1/chat/completions."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None

    def token_limit(self) -> int | None:
        """The newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def alternatives(self) -> int | None:
        """``top_logprobs`` when ``logprobs`` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None


R = TypeVar("R", bound=GenerationRequest)


def parse_request(model: type[R], body: Any) -> R:
    """A request from decoded JSON; raises ApiError naming the first field that is wrong, unknown or unsupported."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    kept = {}
    for name, value in body.items():
        if name in model.model_fields:
            kept[name] = value
        elif name not in IGNORED:
            _refuse(name, value, model)
    try:
        request = model.model_validate(kept)
    except ValidationError as error:
        raise _translate(error) from error
    _check_consistent(request)
    return request


def _refuse(name: str, value: Any, model: type[GenerationRequest]) -> None:
    if name in UNSUPPORTED:
        if value is None or value in UNSUPPORTED[name]:
            return
        raise ApiError(f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    near = difflib.get_close_matches(name, model.model_fields, n=1)
    hint = f"did you mean {near[0]}?" if near else None
    raise ApiError(f"unknown field {name!r}", param=name, code="unknown_parameter", hint=hint)


def _translate(error: ValidationError) -> ApiError:
    """The first problem of a pydantic error, in one line. A union reports each of its types: they are joined."""
    first, *rest = error.errors()
    same = [first, *(e for e in rest if e["loc"][0] == first["loc"][0])]
    path = [str(steps[0]) for steps in zip(*(e["loc"] for e in same)) if len(set(steps)) == 1]
    field, where = path[0], ".".join(path)
    if first["type"] == "missing":
        return ApiError(f"{where} is required", param=field, code="missing_required_parameter")
    expected = "; or ".join(dict.fromkeys(e["msg"] for e in same))
    return ApiError(f"{where}: {expected}", param=field)


def _check_consistent(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options needs stream: true", param="stream_options")
    if request.top_k is not None and request.top_k < -1:
        raise ApiError(f"top_k must be at least 0 (0 and -1 are off), not {request.top_k}", param="top_k")
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        raise ApiError("echo with logprobs is not supported", param="echo", code="unsupported_parameter")


def _logit_bias(raw: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in raw.items()}
    except ValueError as error:
        raise ApiError(f"logit_bias keys must be token ids: {error}", param="logit_bias") from error
