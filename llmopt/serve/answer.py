"""Answers a request: several choices side by side, whole or as a stream of chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.runtime.chat import ChatTemplate
from llmopt.runtime.params import GenerationParams, check_params, check_prompt
from llmopt.runtime.stream import Delta, RequestStream
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.client import TokenSource
from llmopt.serve.errors import ApiError, error_body
from llmopt.serve.prompts import request_prompts
from llmopt.serve.requests import ChatRequest, GenerationRequest
from llmopt.serve.responses import ChoiceWriter, Head, usage
from llmopt.serve.wire import Ready


@dataclass(frozen=True)
class Model:
    """What the API process knows of the model it serves."""

    name: str
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    engine: Ready
    created: int


@dataclass(frozen=True)
class Choice:
    """One sequence of an answer. ``echo``: text put before its own."""

    prompt: list[int]
    params: GenerationParams
    writer: ChoiceWriter
    stream: RequestStream
    echo: str


class Answer:
    """One request, validated: every error a client can cause is raised here, before any token is drawn."""

    def __init__(self, request: GenerationRequest, model: Model, client: TokenSource) -> None:
        if request.model is not None and request.model != model.name:
            what = f"the model {request.model!r} does not exist; this server serves {model.name!r}"
            raise ApiError(what, param="model", code="model_not_found", status=404)
        self._request, self._client = request, client
        self.head = Head(model.name, chat=isinstance(request, ChatRequest))
        self._prompts = request_prompts(request, model.tokenizer, model.chat)
        self._choices = [
            self._choice(model, p * request.choices + i, ids, echo, request.params(i))
            for p, (ids, echo) in enumerate(self._prompts)
            for i in range(request.choices)
        ]

    def _choice(self, model: Model, index: int, ids: list[int], echo: str, params: GenerationParams) -> Choice:
        check_params(params, model.engine.vocab_size)
        check_prompt(ids, model.engine.vocab_size, model.engine.context)
        logprobs = params.sampling.logprobs is not None
        writer = ChoiceWriter(index, model.tokenizer, chat=self.head.chat, logprobs=logprobs)
        return Choice(ids, params, writer, RequestStream(model.tokenizer.stream(), params.stop), echo)

    def _usage(self) -> dict[str, int]:
        return usage(sum(len(ids) for ids, _ in self._prompts), sum(c.stream.count for c in self._choices))

    async def _deltas(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        async with aclosing(self._client.generate(choice.prompt, choice.params)) as outputs:
            async for output in outputs:
                delta = choice.stream.push(output)
                yield delta
                if delta.finish_reason:
                    return

    async def whole(self) -> dict[str, Any]:
        """The answer in one body; cancelling the call cancels what runs."""

        async def run(choice: Choice) -> dict[str, Any]:
            async with aclosing(self._deltas(choice)) as deltas:
                return choice.writer.whole([delta async for delta in deltas], choice.echo)

        tasks = [asyncio.create_task(run(choice)) for choice in self._choices]
        try:
            choices = await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)
        return self.head.body(choices, chunk=False, usage=self._usage())

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events; an error after the first chunk is an event of its own, and the last one."""
        queue: asyncio.Queue[dict[str, Any] | LlmoptError | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(choice, queue)) for choice in self._choices]
        running = len(tasks)
        try:
            while running:
                item = await queue.get()
                if isinstance(item, LlmoptError):
                    yield _event(error_body(item))
                    return
                if item is None:
                    running -= 1
                else:
                    yield self._chunk([item])
            if self._request.include_usage:
                yield _event(self.head.body([], chunk=True, usage=self._usage()))
            yield "data: [DONE]\n\n"
        finally:
            await _cancel(tasks)

    async def _pump(self, choice: Choice, queue: asyncio.Queue[dict[str, Any] | LlmoptError | None]) -> None:
        """Chunks of one choice, then None, or an error."""
        try:
            if (first := choice.writer.first_chunk(choice.echo)) is not None:
                queue.put_nowait(first)
            async with aclosing(self._deltas(choice)) as deltas:
                async for delta in deltas:
                    if (chunk := choice.writer.chunk(delta)) is not None:
                        queue.put_nowait(chunk)
            queue.put_nowait(None)
        except LlmoptError as error:
            queue.put_nowait(error)

    def _chunk(self, choices: list[dict[str, Any]]) -> str:
        body = self.head.body(choices, chunk=True)
        return _event({**body, "usage": None} if self._request.include_usage else body)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
