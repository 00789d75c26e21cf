"""HTTP/1.1 as a load generator wants it: body bytes handed over with the time they arrived, little work a chunk.

A general client costs 81 us a streamed chunk before anything reads it (httpx 0.28), this one 32 us with the events
parsed: at 12,000 tokens a second the first would be all that is measured. Bytes are parsed inside ``data_received``,
so a time is that of arrival, not of a task's turn.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from llmopt.errors import ConfigError

Body = Callable[[bytes, float], None]
"""Called with every piece of a body and ``time.perf_counter()`` of its arrival."""


class HttpError(Exception):
    """The connection broke, or what came is not HTTP."""


class ResponseParser:
    """One response, fed in arbitrary pieces. ``status``: 0 until its head is complete."""

    def __init__(self) -> None:
        self.status, self.done, self.keep_alive = 0, False, True
        self._buffer = bytearray()
        self._left: int | None = None  # bytes of a body of known length
        self._chunked = False

    def feed(self, data: bytes) -> bytes:
        """The body bytes among ``data``; raises HttpError for what is no response."""
        if self.status and not self._chunked:
            return self._counted(data)
        self._buffer += data
        if not self.status:
            if not self._head():
                return b""
            if not self._chunked:
                rest = bytes(self._buffer)
                self._buffer.clear()
                return self._counted(rest)
        return self._chunks()

    def close(self) -> None:
        """The server closed the connection: the end of a body without length, else HttpError."""
        if self.done:
            return
        if not self.status or self._chunked or self._left is not None:
            raise HttpError("the server closed the connection")
        self.done = True

    def _counted(self, data: bytes) -> bytes:
        if self._left is None:
            return data
        if len(data) > self._left:
            raise HttpError("more bytes than the content-length")
        self._left -= len(data)
        self.done = self._left == 0
        return data

    def _head(self) -> bool:
        """Parse status line and headers; False while they are incomplete."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        try:
            version, status, *_ = first.split(b" ")
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines)}
            self.status = int(status)
            if not version.startswith(b"HTTP/1."):
                raise ValueError
            length = headers.get(b"content-length")
            self._left = None if length is None else int(length)
        except ValueError as error:
            raise HttpError(f"not HTTP: {first[:80]!r}") from error
        if self.status < 200:  # an interim response: the real one follows
            self.status = 0
            return self._head()
        self.keep_alive = version == b"HTTP/1.1" and headers.get(b"connection", b"").lower() != b"close"
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self.done = not self._chunked and (self._left == 0 or self.status in (204, 304))
        return True

    def _chunks(self) -> bytes:
        """Whole chunks, unwrapped; trailers are not expected."""
        body, buffer, at = [], self._buffer, 0
        while (line := buffer.find(b"\r\n", at)) >= 0:
            try:
                size = int(bytes(buffer[at:line]).partition(b";")[0], 16)
            except ValueError as error:
                raise HttpError(f"not a chunk: {bytes(buffer[at:line])[:80]!r}") from error
            end = line + 2 + size
            if len(buffer) < end + 2:
                break
            if size:
                body.append(bytes(buffer[line + 2 : end]))
            at = end + 2
            if not size:
                self.done = True
                break
        del buffer[:at]
        return body[0] if len(body) == 1 else b"".join(body)


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.usable, self.fresh = True, True
        self._parser = ResponseParser()
        self._body: Body = lambda data, at: None
        self._answer: asyncio.Future[int] | None = None
        self.heard = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    async def exchange(self, request: bytes, body: Body) -> int:
        """Send a request, pass on the body of its response, return the status."""
        assert self.transport is not None
        self._parser, self._body, self.heard = ResponseParser(), body, False
        self._answer = asyncio.get_running_loop().create_future()
        if not self.usable:
            raise HttpError("the server closed the connection")
        self.transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        at = time.perf_counter()
        self.heard = True
        if self._answer is None or self._answer.done():
            return self.close()  # nobody asked
        try:
            piece = self._parser.feed(data)
            if piece:
                self._body(piece, at)
        except Exception as error:
            self._answer.set_exception(error)
            return self.close()
        if self._parser.done:
            self.usable, self.fresh = self._parser.keep_alive and self.usable, False
            self._answer.set_result(self._parser.status)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self._answer is None or self._answer.done():
            return
        try:
            self._parser.close()
            self._answer.set_result(self._parser.status)
        except HttpError as error:
            self._answer.set_exception(HttpError(str(exc)) if exc else error)

    def close(self) -> None:
        """Break the connection off; the server sees a client that left."""
        self.usable = False
        if self.transport is not None:
            self.transport.abort()


@dataclass(frozen=True)
class Address:
    """Where a server is. ``path``: what its base URL ends with, without a slash at the end."""

    host: str
    port: int
    path: str
    secure: bool


def parse_url(url: str) -> Address:
    """``http(s)://host[:port][/path]``; raises ConfigError for anything else."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"{url!r} is not an address: {error}", hint="write http://HOST:PORT") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is not the address of a server", hint="write http://HOST:PORT")
    return Address(parts.hostname, port, parts.path.rstrip("/"), parts.scheme == "https")


class HttpPool:
    """Connections to one server, kept alive between requests; as many as there are requests at once."""

    def __init__(self, address: Address, headers: dict[str, str]) -> None:
        self.address = address
        host = f"[{address.host}]" if ":" in address.host else address.host
        lines = [f"host: {host}:{address.port}", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "\r\n".join(lines)
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if address.secure else None

    async def request(self, method: str, path: str, content: bytes, body: Body, **headers: str) -> int:
        """One exchange; returns the status. ``headers``: more than the pool's. Cancelling it breaks the connection off.

        A kept connection may have been closed by the server meanwhile: a request that got no byte of an answer on
        one goes out again on another. Raises HttpError or OSError.
        """
        lines = [f"{method} {self.address.path}{path} HTTP/1.1", self._head, f"content-length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        data = "\r\n".join((*lines, "\r\n")).encode("latin-1") + content
        while True:
            connection = self._idle.pop() if self._idle else await self._open()
            try:
                status = await connection.exchange(data, body)
            except HttpError:
                if connection.fresh or connection.heard:
                    raise
                continue
            except BaseException:
                connection.close()
                raise
            if connection.usable:
                self._idle.append(connection)
            else:
                connection.close()
            return status

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self.address.host, self.address.port, ssl=self._tls)
        return connection

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()
