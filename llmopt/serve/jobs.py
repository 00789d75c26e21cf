"""Reads files of requests: JSON lines in OpenAI's batch form or plain."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.errors import RequestError
from llmopt.serve.errors import ApiError
from llmopt.serve.requests import ChatRequest, CompletionRequest, GenerationRequest, parse_request

ENDPOINTS: dict[str, type[GenerationRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}


@dataclass(frozen=True)
class Job:
    """One line: what it asks for, whether it came in OpenAI's batch form, and its id (None: it has none).

    ``request``: the error instead when a line of the batch form asks for something the API would refuse.
    """

    line: int
    request: GenerationRequest | ApiError
    batch: bool
    custom_id: str | None


@dataclass
class JobFile:
    """A file of requests, read twice: once whole to find what is wrong, then line by line as they run.

    ``defaults``: fields that plain requests take when they have none of their own.
    """

    path: Path
    defaults: dict[str, Any]
    lines: dict[int, tuple[int, int]] = field(default_factory=dict)
    digest: str = ""

    def scan(self) -> Iterator[Job]:
        """Every job, in order; afterwards ``lines`` (number → place in the file) and ``digest`` (sha256) are known.

        A line is ``{"custom_id", "method", "url", "body"}`` or a plain request with ``prompt`` or ``messages``;
        empty lines do not count. Raises RequestError naming the line that is not UTF-8, not JSON, no request, or
        repeats an id.
        """
        digest, ids = hashlib.sha256(), dict[str, int]()
        for number, start, raw in self._raw_lines():
            digest.update(raw)
            if not raw.strip():
                continue
            with located(self.path, number):
                job = read_job(raw, number, self.defaults)
                if job.custom_id is not None and (first := ids.setdefault(job.custom_id, number)) != number:
                    raise RequestError(f"custom_id {job.custom_id!r} is that of line {first} too")
            self.lines[number] = (start, len(raw))
            yield job
        self.digest = digest.hexdigest()
        if not self.lines:
            raise RequestError("the file holds no requests", where=str(self.path))

    def job(self, line: int) -> Job:
        """One job of a scanned file, read again."""
        start, size = self.lines[line]
        with self.path.open("rb") as file, located(self.path, line):
            file.seek(start)
            return read_job(file.read(size), line, self.defaults)

    def _raw_lines(self) -> Iterator[tuple[int, int, bytes]]:
        try:
            with self.path.open("rb") as file:
                start = 0
                for number, raw in enumerate(file, 1):
                    yield number, start, raw
                    start += len(raw)
        except OSError as error:
            raise RequestError(f"cannot read: {error.strerror}", where=str(self.path)) from error


@contextlib.contextmanager
def located(path: Path, line: int) -> Iterator[None]:
    """Puts file and line in front of a request's error."""
    try:
        yield
    except RequestError as error:
        raise RequestError(str(error), where=f"{path} line {line}") from error


def read_job(raw: bytes, number: int, defaults: dict[str, Any]) -> Job:
    """The job on a line. Raises RequestError when it is none."""
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise RequestError(f"invalid UTF-8: byte {raw[error.start]:#04x} at column {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError("expected a JSON object")
    if "url" in value or "body" in value:
        return _batch_job(value, number)
    custom_id = value.pop("custom_id", None)
    request = parse_request(ChatRequest if "messages" in value else CompletionRequest, {**defaults, **value})
    if request.stream:
        raise RequestError("a file of requests cannot stream")
    if request.choices > 1 or (isinstance(request, CompletionRequest) and len(request.prompts()) > 1):
        raise RequestError("several answers to one line need the batch form", hint='use "url" and "body"')
    if isinstance(request, ChatRequest) and request.callable_tools:
        raise RequestError("tool calls need the batch form", hint='use "url" and "body"')
    return Job(number, request, False, None if custom_id is None else str(custom_id))


def _batch_job(value: dict[str, Any], number: int) -> Job:
    """A line of the batch form: its frame must be right; what its body asks for may be refused in its answer."""
    if unknown := set(value) - {"custom_id", "method", "url", "body"}:
        raise RequestError(f"unknown field {sorted(unknown)[0]!r} beside custom_id, method, url and body")
    if not isinstance(value.get("custom_id"), str):
        raise RequestError("the batch form needs a custom_id, a string")
    kind = ENDPOINTS.get(str(value.get("url")))
    if kind is None or value.get("method", "POST") != "POST":
        hint = f"POST to {' or '.join(ENDPOINTS)}"
        raise RequestError(f"cannot {value.get('method', 'POST')} to {value.get('url')}", hint=hint)
    if not isinstance(value.get("body"), dict):
        raise RequestError("the body must be a JSON object")
    try:
        request = parse_request(kind, value["body"])
        if request.stream:
            raise ApiError("a file of requests cannot stream", param="stream")
    except ApiError as error:
        return Job(number, error, True, value["custom_id"])
    return Job(number, request, True, value["custom_id"])
