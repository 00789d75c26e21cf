"""Answers a request: several choices side by side, whole or as a stream of chunks."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from llmopt.errors import LlmoptError, RequestError, ResourceError
from llmopt.runtime.chat import ChatTemplate
from llmopt.runtime.grammar import GrammarCompiler
from llmopt.runtime.params import GenerationParams, Grammar, check_params, check_prompt
from llmopt.runtime.stream import Delta, RequestStream
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.client import TokenSource
from llmopt.serve.constraints import grammar_param, request_grammar
from llmopt.serve.errors import ApiError, error_body
from llmopt.serve.fields import NamedTool
from llmopt.serve.limits import Limits
from llmopt.serve.observe import Observer
from llmopt.serve.prompts import request_prompts
from llmopt.serve.requests import ChatRequest, CompletionRequest, GenerationRequest
from llmopt.serve.responses import ChatWriter, ChoiceWriter, CompletionWriter, Head, usage
from llmopt.serve.tools import ToolFormat, detect_format
from llmopt.serve.wire import Ready

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """What the API process knows of the model it serves.

    ``form``: the format of its tool calls (None: the one its template teaches). ``grammars``: compiles grammars here
    first, to refuse a bad one before it reaches the engine.
    """

    name: str
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    engine: Ready
    created: int
    form: ToolFormat | None = None
    grammars: GrammarCompiler | None = None
    limits: Limits = field(default_factory=Limits)

    @cached_property
    def tools(self) -> ToolFormat:
        """The format of its tool calls."""
        return self.form or detect_format(None if self.chat is None else self.chat.source)


@dataclass(frozen=True)
class Caller:
    """Who asks: the ``tenant`` whose share of the server is used, and the id of the HTTP request."""

    tenant: str = ""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Choice:
    """One sequence of an answer."""

    prompt: list[int]
    params: GenerationParams
    writer: ChoiceWriter
    stream: RequestStream


class Answer:
    """One request, validated: every error a client can cause is raised here, before any token is drawn."""

    def __init__(
        self,
        request: GenerationRequest,
        model: Model,
        client: TokenSource,
        caller: Caller | None = None,
        observer: Observer | None = None,
    ) -> None:
        if request.model is not None and request.model != model.name:
            what = f"the model {request.model!r} does not exist; this server serves {model.name!r}"
            raise ApiError(what, param="model", code="model_not_found", status=404)
        caller = caller or Caller()
        self._request, self._client, self._observer = request, client, observer or Observer()
        self.head = Head(model.name, chat=isinstance(request, ChatRequest), id=caller.request_id)
        self._model, self._caller = model, caller
        self._prompts = request_prompts(
            request, model.tokenizer, model.chat, model.tools, model.limits, model.engine.context
        )
        self._grammar = self._checked_grammar()
        self._choices = [
            self._choice(p * request.choices + i, ids, echo, request.params(i))
            for p, (ids, echo) in enumerate(self._prompts)
            for i in range(request.choices)
        ]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(ids) for ids, _ in self._prompts)

    @property
    def completion_tokens(self) -> int:
        """Tokens drawn so far."""
        scoring = isinstance(self._request, CompletionRequest) and self._request.scoring
        return 0 if scoring else sum(c.stream.count for c in self._choices)

    def _checked_grammar(self) -> Grammar | None:
        grammar = request_grammar(self._request, self._model.tools, self._model.tokenizer.added_id)
        if grammar is not None and self._model.grammars is not None:
            try:
                self._model.grammars.compile(grammar)
            except RequestError as error:
                raise ApiError(str(error), param=grammar_param(self._request)) from error
            except ResourceError as error:
                raise ApiError(str(error), param=grammar_param(self._request), status=501) from error
        return grammar

    def _choice(self, index: int, ids: list[int], echo: str, params: GenerationParams) -> Choice:
        model = self._model
        params = replace(
            model.limits.bounded(params),
            grammar=self._grammar,
            tenant=self._caller.tenant,
        )
        check_params(params, model.engine.vocab_size)
        check_prompt(ids, model.engine.vocab_size, model.engine.context)
        writer, form = self._writer(index, echo, params)
        markers = form.markers if form is not None else ()
        kept = frozenset(i for marker in markers if (i := model.tokenizer.added_id(marker)) is not None)
        return Choice(ids, params, writer, RequestStream(model.tokenizer.stream(keep=kept), params.stop))

    def _writer(self, index: int, echo: str, params: GenerationParams) -> tuple[ChoiceWriter, ToolFormat | None]:
        """Writes the choice; the format of the tool calls it may hold."""
        request, tokenizer, logprobs = self._request, self._model.tokenizer, params.sampling.logprobs is not None
        if isinstance(request, ChatRequest):
            form = self._model.tools if request.callable_tools else None
            forced = isinstance(request.tool_choice, NamedTool)
            return ChatWriter(index, tokenizer, logprobs=logprobs, form=form, forced=forced), form
        assert isinstance(request, CompletionRequest)
        return CompletionWriter(index, tokenizer, logprobs=logprobs, echo=echo, scoring=request.scoring), None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that no choice had to compute."""
        n = self._request.choices
        return sum(min(c.stream.cached for c in self._choices[p : p + n]) for p in range(0, len(self._choices), n))

    def _usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    async def _deltas(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        watch = self._observer.choice(len(choice.prompt))
        try:
            async with aclosing(self._client.generate(choice.prompt, choice.params)) as outputs:
                async for output in outputs:
                    delta = choice.stream.push(output)
                    if output.cached is not None:
                        watch.begin(output.waited)
                    watch.token()
                    if delta.finish_reason:
                        watch.finish(delta.finish_reason)
                    yield delta
                    if delta.finish_reason:
                        return
        finally:
            watch.close()

    async def whole(self) -> dict[str, Any]:
        """The answer in one body; cancelling the call cancels what runs."""

        async def run(choice: Choice) -> dict[str, Any]:
            async with aclosing(self._deltas(choice)) as deltas:
                return choice.writer.whole([delta async for delta in deltas])

        tasks = [asyncio.create_task(run(choice)) for choice in self._choices]
        try:
            choices = await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)
        return self.head.body(choices, chunk=False, usage=self._usage())

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events; an error after the first one is an event of its own, and the last one.

        Nothing comes before the first token, so that a request the engine refuses raises its error here. Events that
        wait are given in one piece: a write to a socket is most of what a token costs this process.
        """
        queue: asyncio.Queue[dict[str, Any] | LlmoptError | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(choice, queue)) for choice in self._choices]
        running, begun = len(tasks), False
        try:
            while running:
                piece: list[str] = []
                for item in [await queue.get(), *_waiting(queue)]:
                    if isinstance(item, LlmoptError):
                        if not begun:
                            raise item
                        yield "".join([*piece, _event(error_body(item))])
                        return
                    if item is None:
                        running -= 1
                    else:
                        begun = True
                        piece.append(self._chunk([item]))
                if not running:
                    if self._request.include_usage:
                        piece.append(_event(self.head.body([], chunk=True, usage=self._usage())))
                    piece.append("data: [DONE]\n\n")
                if piece:
                    yield "".join(piece)
        finally:
            await _cancel(tasks)

    async def _pump(self, choice: Choice, queue: asyncio.Queue[dict[str, Any] | LlmoptError | None]) -> None:
        """Chunks of one choice, then None, or an error."""
        try:
            async with aclosing(self._deltas(choice)) as deltas:
                async for delta in deltas:
                    if choice.stream.count == 1 and (first := choice.writer.first_chunk()) is not None:
                        queue.put_nowait(first)
                    if (chunk := choice.writer.chunk(delta)) is not None:
                        queue.put_nowait(chunk)
            queue.put_nowait(None)
        except LlmoptError as error:
            queue.put_nowait(error)

    def _chunk(self, choices: list[dict[str, Any]]) -> str:
        body = self.head.body(choices, chunk=True)
        return _event({**body, "usage": None} if self._request.include_usage else body)


def _waiting(queue: asyncio.Queue[T]) -> Iterator[T]:
    """What a queue holds now."""
    while not queue.empty():
        yield queue.get_nowait()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
