"""Messages between the API process and the engine process: length-prefixed JSON frames over a local socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from llmopt.errors import DeadlineError, OverloadError, QueueFullError, RequestError
from llmopt.runtime.core import TokenOutput
from llmopt.runtime.params import GenerationParams, Grammar
from llmopt.runtime.protocol import Sampled, SamplingParams

VERSION = 4
MAX_FRAME = 1 << 28
"""Bytes; a longer frame is a broken peer."""

_LENGTH = struct.Struct(">I")


class WireError(Exception):
    """The peer closed the connection, or sent something that is no message."""


@dataclass(frozen=True)
class Ready:
    """Engine → API, once: the artifact is loaded. ``context``: most tokens of a sequence, prompt and output."""

    version: int
    context: int
    vocab_size: int
    max_sequences: int


@dataclass(frozen=True)
class Fatal:
    """Engine → API, last: the engine ends. ``exit_code`` and ``message`` are those of the typed error."""

    exit_code: int
    message: str


@dataclass(frozen=True)
class Add:
    """API → engine: a request under an id of the API's choice."""

    request: int
    prompt: list[int]
    params: GenerationParams


@dataclass(frozen=True)
class Cancel:
    """API → engine: the request's answer is no longer wanted; an unknown id is fine."""

    request: int


@dataclass(frozen=True)
class Refused:
    """Engine → API: a request was invalid, or had to be ended. ``kind``: the name of the error's class.

    ``retry_after``: seconds after which to ask again, for errors of overload.
    """

    request: int
    message: str
    kind: str = "RequestError"
    retry_after: float | None = None

    @staticmethod
    def of(request: int, error: RequestError) -> Refused:
        """The message for an error."""
        retry_after = error.retry_after if isinstance(error, OverloadError) else None
        kind = type(error).__name__ if type(error) in _OVERLOADS.values() else "RequestError"
        return Refused(request, str(error), kind, retry_after)

    def error(self) -> RequestError:
        """The error it stands for."""
        cls = _OVERLOADS.get(self.kind)
        return RequestError(self.message) if cls is None else cls(self.message, retry_after=self.retry_after or 1.0)


@dataclass(frozen=True)
class Tokens:
    """Engine → API: the tokens of one step, ``request_id`` being the API's."""

    outputs: list[TokenOutput]


@dataclass(frozen=True)
class Stop:
    """API → engine: exit. Requests still running are dropped."""


@dataclass(frozen=True)
class Ping:
    """API → engine: say that you are alive. Answered between two steps."""

    number: int


@dataclass(frozen=True)
class Pong:
    """Engine → API: the answer to a ping, with what the engine counts (docs/serving.md names the values)."""

    number: int
    stats: dict[str, float]


Message: TypeAlias = Ready | Fatal | Add | Cancel | Refused | Tokens | Stop | Ping | Pong
_TYPES: dict[str, Any] = {t.__name__: t for t in (Ready, Fatal, Add, Cancel, Refused, Tokens, Stop, Ping, Pong)}
_OVERLOADS = {c.__name__: c for c in (OverloadError, QueueFullError, DeadlineError)}


def encode(message: Message) -> bytes:
    """One frame: four bytes of length, then ``[type, fields]`` as JSON."""
    if isinstance(message, Tokens):
        body: dict[str, Any] = {"outputs": [_pack(output) for output in message.outputs]}
    else:
        body = asdict(message)
    data = json.dumps([type(message).__name__, body], separators=(",", ":")).encode()
    return _LENGTH.pack(len(data)) + data


def decode(data: bytes) -> Message:
    """Inverse of encode, without the length. Raises WireError."""
    try:
        name, body = json.loads(data)
        cls = _TYPES[name]
        if set(body) != {f.name for f in fields(cls)}:
            raise ValueError(f"fields of {name}: {sorted(body)}")
        if cls is Tokens:
            body = {"outputs": [_unpack(raw) for raw in body["outputs"]]}
        elif cls is Add:
            body["params"] = _params(body["params"])
        message: Message = cls(**body)
        return message
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WireError(f"not a message: {error!r}") from error


def _pack(output: TokenOutput) -> list[Any]:
    packed = [output.request_id, output.finish_reason, *_pack_token(output.sampled)]
    if output.cached is not None:
        packed += [output.cached, output.waited, [_pack_token(s) for s in output.prompt]]
    return packed


def _pack_token(sampled: Sampled) -> list[Any]:
    return [sampled.token, sampled.logprob, sampled.top]


def _unpack(raw: list[Any]) -> TokenOutput:
    request, reason, token, logprob, top, *first = raw
    output = TokenOutput(request, _unpack_token(token, logprob, top), reason)
    if first:
        output.cached, output.waited, prompt = first
        output.prompt = tuple(_unpack_token(*entry) for entry in prompt)
    return output


def _unpack_token(token: int, logprob: float | None, top: list[Any]) -> Sampled:
    return Sampled(token, logprob, tuple((i, p) for i, p in top))


def _params(raw: dict[str, Any]) -> GenerationParams:
    sampling = raw["sampling"]
    bias = {int(token): value for token, value in sampling["logit_bias"].items()}
    stops = {name: tuple(raw[name]) for name in ("stop", "stop_token_ids")}
    grammar = None if raw["grammar"] is None else Grammar(**raw["grammar"])
    drawn = SamplingParams(**{**sampling, "logit_bias": bias})
    return GenerationParams(**{**raw, **stops, "sampling": drawn, "grammar": grammar})


def _length(head: bytes) -> int:
    length: int = _LENGTH.unpack(head)[0]
    if length > MAX_FRAME:
        raise WireError(f"a frame of {length} bytes")
    return length


async def read_message(reader: asyncio.StreamReader) -> Message:
    """The next message; raises WireError when the peer is gone."""
    try:
        length = _length(await reader.readexactly(_LENGTH.size))
        return decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise WireError("the connection is closed") from error


class Channel:
    """The engine's side: a blocking socket, polled between steps. A context manager: leaving it closes it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def wake(self) -> None:
        """Make a waiting ``receive`` return; any thread may call it."""
        with contextlib.suppress(OSError):  # full: it will wake anyhow; closed: nobody waits
            self._waker.send(b"x")

    def close(self) -> None:
        """Close what ``wake`` needs; the connection is its owner's."""
        self._woken.close()
        self._waker.close()

    def send(self, message: Message) -> None:
        """Send one message; raises WireError when the peer is gone."""
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise WireError("the connection is closed") from error

    def receive(self, wait: bool) -> list[Message]:
        """Every message that has arrived; with ``wait`` at least one, unless woken.

        Raises WireError when the peer is gone.
        """
        messages = self._parse()
        while True:
            sources = [self._socket, self._woken]
            ready, _, _ = select.select(sources, [], [], None if wait and not messages else 0)
            if self._woken in ready:
                self._woken.recv(1 << 12)
                wait = False
            if self._socket not in ready:
                if ready:
                    continue
                return messages
            try:
                data = self._socket.recv(1 << 16)
            except OSError as error:
                raise WireError("the connection is closed") from error
            if not data:
                raise WireError("the connection is closed")
            self._buffer += data
            messages += self._parse()

    def _parse(self) -> list[Message]:
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _length(bytes(self._buffer[: _LENGTH.size]))
            if len(self._buffer) < end:
                break
            messages.append(decode(bytes(self._buffer[_LENGTH.size : end])))
            del self._buffer[:end]
        return messages
