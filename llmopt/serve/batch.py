"""Files of requests: JSON lines in OpenAI's batch form or plain, answered by an engine in this process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llmopt.errors import RequestError
from llmopt.runtime.chat import ChatTemplate
from llmopt.runtime.engine import Engine
from llmopt.runtime.params import check_params, check_prompt
from llmopt.runtime.stream import Delta
from llmopt.serve.prompts import request_prompts
from llmopt.serve.requests import ChatRequest, CompletionRequest, GenerationRequest, parse_request
from llmopt.serve.responses import ChoiceWriter, Head, usage

ENDPOINTS: dict[str, type[CompletionRequest] | type[ChatRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}


@dataclass(frozen=True)
class Job:
    """One line: a request, whether it came in OpenAI's batch form, and its id (None: it has none)."""

    line: int
    request: CompletionRequest | ChatRequest
    batch: bool
    custom_id: str | None


def read_jobs(path: Path, defaults: dict[str, Any]) -> list[Job]:
    """Requests of a file, one a line; empty lines do not count.

    A line is ``{"custom_id", "method", "url", "body"}`` or a plain request with ``prompt`` or ``messages``;
    ``defaults`` are fields that plain requests take when they have none of their own. Raises RequestError
    naming the line that is not UTF-8, not JSON or not a valid request.
    """
    jobs = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RequestError(f"cannot read: {error.strerror}", where=str(path)) from error
    for number, raw in enumerate(lines, 1):
        if raw.strip():
            with located(path, number):
                jobs.append(_read_job(raw, number, defaults))
    if not jobs:
        raise RequestError("the file holds no requests", where=str(path))
    return jobs


@contextlib.contextmanager
def located(path: Path, line: int) -> Iterator[None]:
    """Puts file and line in front of a request's error."""
    try:
        yield
    except RequestError as error:
        raise RequestError(str(error), where=f"{path} line {line}") from error


def _read_job(raw: bytes, number: int, defaults: dict[str, Any]) -> Job:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise RequestError(f"invalid UTF-8: byte {raw[error.start]:#04x} at column {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError("expected a JSON object")
    batch = "url" in value or "body" in value
    custom_id = value.pop("custom_id", None)
    if batch:
        url, kind = value.get("url"), ENDPOINTS.get(str(value.get("url")))
        if kind is None or value.get("method", "POST") != "POST":
            hint = f"POST to {' or '.join(ENDPOINTS)}"
            raise RequestError(f"cannot {value.get('method', 'POST')} to {url}", hint=hint)
        body = value.get("body")
    else:
        kind = ChatRequest if "messages" in value else CompletionRequest
        body = {**defaults, **value}
    request = parse_request(kind, body)
    if request.stream:
        raise RequestError("a file of requests cannot stream")
    if not batch and (request.choices > 1 or (isinstance(request, CompletionRequest) and len(request.prompts()) > 1)):
        raise RequestError("several answers to one line need the batch form", hint='use "url" and "body"')
    return Job(number, request, batch, None if custom_id is None else str(custom_id))


@dataclass
class _Sequence:
    """One choice under way."""

    job: int
    prompt: list[int]
    writer: ChoiceWriter
    echo: str
    deltas: list[Delta] = field(default_factory=list)
    count: int = 0


class BatchRunner:
    """Runs jobs over an engine and gives back their output lines in order."""

    def __init__(self, engine: Engine, chat: ChatTemplate | None, model: str) -> None:
        self._engine, self._chat, self._model = engine, chat, model

    def check(self, path: Path, jobs: Sequence[Job]) -> None:
        """Raise RequestError, naming the line, for a request the engine would refuse: before any of them runs."""
        core = self._engine.core
        for job in jobs:
            with located(path, job.line):
                for ids, _ in self._prompts(job.request):
                    check_params(job.request.params(), core.limits.vocab_size)
                    check_prompt(ids, core.limits.vocab_size, core.context)

    def run(self, jobs: Sequence[Job], progress: Callable[[int], None] = lambda done: None) -> Iterator[dict[str, Any]]:
        """Output objects, one a job; ``progress`` hears how many jobs are done. Leaving early cancels the rest."""
        heads = [Head(self._model, chat=isinstance(job.request, ChatRequest)) for job in jobs]
        running: dict[int, _Sequence] = {}
        parts: list[list[_Sequence]] = [[] for _ in jobs]
        left, done, written = [0] * len(jobs), 0, 0
        try:
            for index, job in enumerate(jobs):
                for request_id, sequence in self._start(index, job.request, heads[index].chat):
                    running[request_id] = sequence
                    parts[index].append(sequence)
                    left[index] += 1
            while running:
                for output in self._engine.step():
                    sequence = running[output.request_id]
                    sequence.deltas.append(output.delta)
                    if output.finished:
                        sequence.count = output.completion_tokens
                        del running[output.request_id]
                        left[sequence.job] -= 1
                        done += left[sequence.job] == 0
                        progress(done)
                while written < len(jobs) and left[written] == 0:
                    yield _render(jobs[written], heads[written], parts[written])
                    parts[written] = []
                    written += 1
        finally:
            for request_id in running:
                self._engine.cancel(request_id)

    def _start(self, job: int, request: GenerationRequest, chat: bool) -> Iterator[tuple[int, _Sequence]]:
        for p, (ids, echo) in enumerate(self._prompts(request)):
            for i in range(request.choices):
                params = request.params(i)
                logprobs = params.sampling.logprobs is not None
                writer = ChoiceWriter(p * request.choices + i, self._engine.tokenizer, chat=chat, logprobs=logprobs)
                yield self._engine.add(ids, params), _Sequence(job, ids, writer, echo)

    def _prompts(self, request: GenerationRequest) -> list[tuple[list[int], str]]:
        return request_prompts(request, self._engine.tokenizer, self._chat)


def _render(job: Job, head: Head, parts: Sequence[_Sequence]) -> dict[str, Any]:
    prompt_tokens = sum(len(s.prompt) for s in parts[:: job.request.choices])
    counts = usage(prompt_tokens, sum(s.count for s in parts))
    named = {} if job.custom_id is None else {"custom_id": job.custom_id}
    if job.batch:
        body = head.body([s.writer.whole(s.deltas, s.echo) for s in parts], chunk=False, usage=counts)
        response = {"status_code": 200, "request_id": head.id, "body": body}
        return {"id": f"batch_req_{head.id}", "custom_id": job.custom_id, "response": response, "error": None}
    (only,) = parts
    return {
        **named,
        "text": only.echo + "".join(d.text for d in only.deltas),
        "tokens": [t.token for d in only.deltas for t in d.tokens],
        "finish_reason": only.deltas[-1].finish_reason,
        "usage": counts,
    }


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[IO[str]]:
    """A text file that takes its name only when the block ends well; nothing is left behind when it does not."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
