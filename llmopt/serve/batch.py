"""Answers files of requests by an engine in this process; a run that was killed goes on where it was."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError, RequestError
from llmopt.runtime.chat import ChatTemplate
from llmopt.runtime.core import EngineCore, TokenOutput
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.answer import Answer, Model
from llmopt.serve.client import TokenSource
from llmopt.serve.errors import error_body, status_of
from llmopt.serve.jobs import Job, JobFile, located
from llmopt.serve.journal import open_journal
from llmopt.serve.local import LocalClient
from llmopt.serve.wire import VERSION, Ready

AHEAD = 2
"""Requests prepared or running at once, for every sequence a step may hold."""

Progress = Callable[[int, int], None]
Result = dict[str, Any]


class BatchRunner:
    """Runs jobs over an engine core, through the same answers as the server's.

    ``served``: the model name lines may ask for.
    """

    def __init__(self, core: EngineCore, tokenizer: Tokenizer, chat: ChatTemplate | None, served: str) -> None:
        ready = Ready(VERSION, core.context, core.limits.vocab_size, core.limits.max_sequences)
        self._model = Model(served, tokenizer, chat, ready, int(time.time()), grammars=core.constraints.compiler)
        self._client = LocalClient(core)
        self._window = AHEAD * core.limits.max_sequences

    def check(self, job: Job) -> None:
        """Raise RequestError for a plain job the engine would refuse: before any of them runs."""
        if not job.batch:
            assert not isinstance(job.request, LlmoptError)
            Answer(job.request, self._model, self._client)

    async def run(self, jobs: Iterable[Job]) -> AsyncGenerator[tuple[Job, Result]]:
        """Jobs and their output objects as they end. Raises ExecutorError when the executor failed."""
        waiting = iter(jobs)
        running, ended = set[asyncio.Task[tuple[Job, Result]]](), set[asyncio.Task[tuple[Job, Result]]]()
        try:
            while True:
                while len(running) < self._window and (job := next(waiting, None)) is not None:
                    running.add(asyncio.create_task(self._one(job)))
                if not running:
                    return
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, *ended, return_exceptions=True)

    async def _one(self, job: Job) -> tuple[Job, Result]:
        return job, await (self._batch(job) if job.batch else self._plain(job))

    async def _batch(self, job: Job) -> Result:
        """The answer the API would give, errors of the request included."""
        try:
            if isinstance(job.request, LlmoptError):
                raise job.request
            answer = Answer(job.request, self._model, self._client)
            name, status, body = answer.head.id, 200, await answer.whole()
        except RequestError as error:
            name, status, body = uuid.uuid4().hex, status_of(error), error_body(error)
        response = {"status_code": status, "request_id": name, "body": body}
        return {"id": f"batch_req_{name}", "custom_id": job.custom_id, "response": response, "error": None}

    async def _plain(self, job: Job) -> Result:
        """Text and tokens of the only choice."""
        assert not isinstance(job.request, LlmoptError)
        recorder = _Recorder(self._client)
        body = await Answer(job.request, self._model, recorder).whole()
        (choice,) = body["choices"]
        return {
            **({} if job.custom_id is None else {"custom_id": job.custom_id}),
            "text": choice["message"]["content"] if "message" in choice else choice["text"],
            "tokens": recorder.tokens,
            "finish_reason": choice["finish_reason"],
            "usage": body["usage"],
        }


class _Recorder:
    """Keeps the tokens of one request on their way."""

    def __init__(self, client: TokenSource) -> None:
        self._client = client
        self.tokens: list[int] = []

    async def generate(self, prompt: list[int], params: GenerationParams) -> AsyncGenerator[TokenOutput, None]:
        """As the client's."""
        async with aclosing(self._client.generate(prompt, params)) as outputs:
            async for output in outputs:
                self.tokens.append(output.sampled.token)
                yield output


def failed(result: Result) -> bool:
    """Whether an output object holds an error instead of an answer."""
    return "response" in result and result["response"]["status_code"] != 200


def checked(source: JobFile, runner: BatchRunner) -> None:
    """Read a whole file; raises RequestError naming the first line that is wrong."""
    for job in source.scan():
        with located(source.path, job.line):
            runner.check(job)


async def run_to_stream(
    runner: BatchRunner, source: JobFile, write: Callable[[str], object], progress: Progress
) -> int:
    """Write output lines in the order of the requests; returns how many failed. ``source`` must be ``checked``."""
    held: dict[int, Result] = {}
    order, failures, done = iter(source.lines), 0, 0
    awaited = next(order, None)
    async for job, result in _results(runner, source, source.lines):
        held[job.line] = result
        failures, done = failures + failed(result), done + 1
        progress(done, len(source.lines))
        while awaited is not None and awaited in held:
            write(json.dumps(held.pop(awaited), ensure_ascii=False) + "\n")
            awaited = next(order, None)
    return failures


async def run_to_file(
    runner: BatchRunner, source: JobFile, output: Path, name: dict[str, Any], progress: Progress
) -> tuple[int, int]:
    """Answer what an earlier run with the same ``name`` left to do, then publish ``output``.

    Returns (requests that were already answered, requests that failed in this run). Killed anywhere, the next run
    goes on; every request is in the output once. Raises ConfigError for what is left of a different run.
    """
    with open_journal(output, {**name, "requests": source.digest}) as journal:
        resumed, failures, total = len(journal.done), 0, len(source.lines)
        progress(resumed, total)
        left = [line for line in source.lines if line not in journal.done]
        async for job, result in _results(runner, source, left):
            journal.add(job.line, result)
            failures += failed(result)
            progress(len(journal.done), total)
        journal.publish(output, list(source.lines))
    return resumed, failures


async def _results(runner: BatchRunner, source: JobFile, lines: Iterable[int]) -> AsyncIterator[tuple[Job, Result]]:
    async with aclosing(runner.run(source.job(line) for line in lines)) as results:
        async for found in results:
            yield found
