"""One request to an OpenAI server, and when each piece of its answer came."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from llmopt.errors import ExecutorError, ResourceError
from llmopt.loadgen.http import HttpError, HttpPool, parse_url
from llmopt.loadgen.sse import EventParser
from llmopt.loadgen.workload import Call

PATHS = {"completions": "/completions", "chat": "/chat/completions"}


@dataclass
class Record:
    """What became of one request. Times are seconds from the start of the run; ``error`` is None when it succeeded.

    ``chunks``: times at which pieces with content came; a piece may hold several tokens.
    """

    due: float
    sent: float = 0.0
    end: float = 0.0
    status: int = 0
    error: str | None = None
    chunks: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first content; None when nothing was streamed."""
        return self.chunks[0] - self.sent if self.chunks else None

    @property
    def e2e(self) -> float:
        """Seconds from sending to the end of the answer."""
        return self.end - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean seconds a token after the first; None for answers of one token."""
        if not self.chunks or self.output_tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: seconds between one piece and the next."""
        return [after - before for before, after in zip(self.chunks, self.chunks[1:])]


@dataclass(frozen=True)
class Endpoint:
    """What every request of a run has in common. ``extra``: fields put into every body."""

    url: str
    endpoint: str = "completions"
    model: str | None = None
    key: str | None = None
    stream: bool = True
    timeout: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)


class Client:
    """Sends calls to one endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        address = parse_url(endpoint.url)
        self._endpoint, self._model = endpoint, endpoint.model
        headers = {"content-type": "application/json", "accept": "*/*"}
        if endpoint.key:
            headers["authorization"] = f"Bearer {endpoint.key}"
        self._pool = HttpPool(address, headers)
        self._root = "" if address.path.endswith("/v1") else "/v1"

    async def connect(self) -> str:
        """Ask the server which models it serves; returns the model of this run.

        Raises ResourceError when there is no server, ExecutorError when what answers is no OpenAI server.
        """
        parts: list[bytes] = []
        url = self._endpoint.url
        try:
            work = self._pool.request("GET", f"{self._root}/models", b"", lambda data, at: parts.append(data))
            status = await asyncio.wait_for(work, 30)
        except (HttpError, OSError, TimeoutError) as error:
            what = f"cannot reach the server: {str(error) or 'no answer in 30 s'}"
            raise ResourceError(what, where=url, hint="is it running?") from error
        text = b"".join(parts)
        if status != 200:
            raise ExecutorError(f"GET /v1/models answered {status}: {error_text(text)}", where=url)
        try:
            names = [card["id"] for card in json.loads(text)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ExecutorError("GET /v1/models did not answer with a list of models", where=url) from error
        if self._model is None and not names:
            raise ExecutorError("the server serves no model", where=url, hint="name one with --model")
        self._model = self._model or str(names[0])
        return self._model

    async def send(self, call: Call, start: float) -> Record:
        """One request; never raises for what the server does. ``start``: perf_counter of the run's start."""
        record = Record(call.due)
        body = {"model": self._model, **self._endpoint.extra, **call.body}
        if self._endpoint.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        content = json.dumps(body).encode()
        reader = _Reader(record, start)
        path = self._root + PATHS[self._endpoint.endpoint]
        record.sent = time.perf_counter() - start
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                record.status = await self._pool.request("POST", path, content, reader.take)
            record.end = time.perf_counter() - start
            reader.finish(self._endpoint.stream)
        except TimeoutError:
            record.error = f"no end within {self._endpoint.timeout:g} s"
        except (HttpError, OSError) as error:
            record.error = str(error) or type(error).__name__
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            record.error = f"not an answer of OpenAI's form: {error!r}"
        record.end = record.end or time.perf_counter() - start
        return record

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


class _Reader:
    """Turns the body of an answer into its record as it comes."""

    def __init__(self, record: Record, start: float) -> None:
        self._record, self._start = record, start
        self._events, self._ended, self._raw = EventParser(), False, bytearray()

    def take(self, data: bytes, at: float) -> None:
        """Bytes of the body; keeps only what is no event."""
        payloads = self._events.feed(data)
        if not payloads and not self._record.chunks:
            self._raw += data
        for payload in payloads:
            if payload == b"[DONE]":
                self._ended = True
            else:
                self._event(json.loads(payload), at - self._start)

    def _event(self, event: dict[str, Any], at: float) -> None:
        if "error" in event:
            self._record.error = error_text(json.dumps(event).encode())
        if counts := event.get("usage"):
            self._count(counts)
        for choice in event.get("choices", ()):
            if _has_tokens(choice):
                self._record.chunks.append(at)
            self._record.finish_reason = choice.get("finish_reason") or self._record.finish_reason

    def finish(self, stream: bool) -> None:
        """The body is complete: find what is missing."""
        record = self._record
        if record.status != 200:
            record.error = f"{record.status}: {error_text(bytes(self._raw))}"
        elif stream:
            if record.error is None and not self._ended:
                record.error = "the stream ended without [DONE]"
            record.output_tokens = record.output_tokens or len(record.chunks)
        else:
            body = json.loads(bytes(self._raw))
            self._count(body.get("usage") or {})
            record.finish_reason = body["choices"][0].get("finish_reason")

    def _count(self, counts: dict[str, Any]) -> None:
        self._record.prompt_tokens = counts.get("prompt_tokens") or 0
        self._record.output_tokens = counts.get("completion_tokens") or 0


def _has_tokens(choice: dict[str, Any]) -> bool:
    """Whether a piece stands for tokens: a chat's first one names the role only, a last one may be empty."""
    if "text" in choice:
        return bool(choice["text"]) or choice.get("finish_reason") is None
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))


def error_text(body: bytes) -> str:
    """The message of an error body, or its beginning when it has another form."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace").strip() or "no message"
