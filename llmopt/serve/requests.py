"""Request bodies of the OpenAI API, read strictly: no field is silently ignored that would change the answer."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import SamplingParams
from llmopt.serve.errors import ApiError
from llmopt.serve.fields import (
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_TOOLS,
    Many,
    NamedTool,
    ResponseFormat,
    Strict,
    StructuredOutputs,
    Tool,
)
from llmopt.serve.messages import Message

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
"""Known fields this server cannot honour, with the values that ask for nothing (as null always does)."""

INSTEAD = {
    "best_of": "ask for n choices with logprobs and choose",
    "function_call": "use tool_choice",
    "functions": "use tools",
    **{f"guided_{kind}": f'use structured_outputs: {{"{kind}": …}}' for kind in ("choice", "grammar", "json", "regex")},
    "reasoning_effort": "use chat_template_kwargs",
    "suffix": "write the model's own fill-in-the-middle prompt",
}

IGNORED = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"})
"""Fields for the provider's books: they never change an answer."""

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Names chat_template_kwargs may not set."""


class StreamOptions(Strict):
    """``include_usage``: a last chunk with token counts."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(Strict):
    """What both endpoints share; fields from ``top_k`` on go beyond OpenAI's, most with vLLM's names."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Many[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Many[int] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None

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

    def prompt_alternatives(self) -> int | None:
        """Alternatives wanted for each prompt token: None, or their number."""
        return self.prompt_logprobs

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
            sampling,
            self.token_limit(),
            stop,
            tuple(self.stop_token_ids or ()),
            bool(self.ignore_eos),
            prompt_logprobs=self.prompt_alternatives(),
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
        )


PROMPTS = Field(max_length=MAX_PROMPTS)


class CompletionRequest(GenerationRequest):
    """/v1/completions."""

    prompt: str | Annotated[Many[str], PROMPTS] | Many[int] | Annotated[Many[Many[int]], PROMPTS]
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def scoring(self) -> bool:
        """Whether the prompt's own log-probabilities are all that is wanted: nothing is generated."""
        return bool(self.echo) and self.max_tokens == 0

    def token_limit(self) -> int | None:
        """OpenAI's default for completions is 16; to score a prompt one token is drawn and not shown."""
        return 1 if self.scoring else 16 if self.max_tokens is None else self.max_tokens

    def prompt_alternatives(self) -> int | None:
        """An echoed prompt has log-probabilities as the answer has."""
        return self.logprobs if self.echo and self.logprobs is not None else self.prompt_logprobs

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

    messages: Many[Message] = Field(max_length=MAX_MESSAGES)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def callable_tools(self) -> list[Tool]:
        """Tools the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    def token_limit(self) -> int | None:
        """The newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def alternatives(self) -> int | None:
        """``top_logprobs`` when ``logprobs`` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None


R = TypeVar("R", bound=GenerationRequest)
S = TypeVar("S", bound=Strict)


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
    request = parse_strictly(model, kept)
    _check_consistent(request)
    return request


def parse_strictly(model: type[S], body: Any) -> S:
    """A body of any shape; raises ApiError naming the first field that is wrong."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _translate(error) from error


def _refuse(name: str, value: Any, model: type[GenerationRequest]) -> None:
    if name in UNSUPPORTED:
        if value is None or value in UNSUPPORTED[name]:
            return
        what = f"{name} is not supported by this server"
        raise ApiError(what, param=name, code="unsupported_parameter", hint=INSTEAD.get(name))
    near = difflib.get_close_matches(name, model.model_fields, n=1)
    hint = f"did you mean {near[0]}?" if near else None
    raise ApiError(f"unknown field {name!r}", param=name, code="unknown_parameter", hint=hint)


def _translate(error: ValidationError) -> ApiError:
    """The first problem of a pydantic error, in one line. A union reports each of its types: they are joined."""
    first, *rest = error.errors()
    same = [first, *(e for e in rest if e["loc"][:1] == first["loc"][:1])]
    path = [str(steps[0]) for steps in zip(*(e["loc"] for e in same)) if len(set(steps)) == 1]
    if not path:
        return ApiError("the body must be a JSON object")
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
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError("prompt_logprobs needs stream: false", param="prompt_logprobs")
    if request.structured_outputs is not None:
        _check_structured(request, request.structured_outputs)
    if isinstance(request, ChatRequest):
        _check_chat(request)


def _check_structured(request: GenerationRequest, wanted: StructuredOutputs) -> None:
    if len(wanted.asked()) != 1:
        raise ApiError("give one of json, regex, choice and grammar", param="structured_outputs")
    if request.response_format is not None and request.response_format.type != "text":
        raise ApiError("structured_outputs and response_format exclude each other", param="structured_outputs")
    if isinstance(request, ChatRequest) and request.callable_tools:
        raise ApiError("structured_outputs and tools exclude each other", param="structured_outputs")


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    if reserved := RESERVED & (request.chat_template_kwargs or {}).keys():
        raise ApiError(f"chat_template_kwargs may not set {min(reserved)}", param="chat_template_kwargs")
    names = [tool.function.name for tool in request.tools or []]
    if len(set(names)) != len(names):
        raise ApiError("two tools have the same name", param="tools")
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in names:
        raise ApiError(f"there is no tool {request.tool_choice.function.name!r}", param="tool_choice")
    if request.tool_choice == "required" and not names:
        raise ApiError("tool_choice required needs tools", param="tool_choice")


def _logit_bias(raw: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in raw.items()}
    except ValueError as error:
        raise ApiError(f"logit_bias keys must be token ids: {error}", param="logit_bias") from error
