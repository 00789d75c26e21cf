"""HTTP connections that clients cannot hold by sending slowly, nor use up by opening many: uvicorn's own have no
deadline for a request's head, and refuse health checks along with everything else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmopt.serve.errors import ApiError, error_body

PROBES = (b"GET /health", b"GET /metrics")
"""Answered on any connection: a server that has enough to do is not a broken one."""
LINGER_SECONDS = 1.0
"""How long a refused client has to read why; one that still sends when its connection is closed would lose that."""


def bounded_connections(seconds: float, most: int) -> type[H11Protocol]:
    """The protocol of connections that close when what a client owes does not arrive within ``seconds``, and of which
    those beyond ``most`` are refused what is no probe.

    A client owes the head of its first request from the moment it connects, that of a later one from its first byte,
    and the rest of a body once its request has been answered (until then the endpoint that reads it counts).
    """

    class BoundedConnection(H11Protocol):
        """One connection; ``deadline``: while the client owes something; ``one_too_many``: it came when all were open;
        ``refused``: it asked for something all the same."""

        deadline: asyncio.TimerHandle | None = None
        one_too_many = refused = False

        def connection_made(self, transport: Any) -> None:
            """A client has connected."""
            super().connection_made(transport)
            self.one_too_many = len(self.connections) > most
            self._count(owes=True)

        def connection_lost(self, exc: Exception | None) -> None:
            """It is gone."""
            self._count(owes=False)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """A piece of a request, or several requests."""
            if self.refused:
                return
            if self.one_too_many and not data.startswith(PROBES):
                self._refuse()
                return
            super().data_received(data)
            self._count(owes=self.conn.their_state is h11.IDLE or self._answered_early())

        def on_response_complete(self) -> None:
            """An answer has been written."""
            super().on_response_complete()
            self._count(owes=self._answered_early())

        def _answered_early(self) -> bool:
            return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is not h11.SEND_RESPONSE

        def _count(self, *, owes: bool) -> None:
            """Start the deadline, or go on with it, or forget it."""
            if owes and not self.transport.is_closing():
                self.deadline = self.deadline or self.loop.call_later(seconds, self._close)
            elif self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def _close(self) -> None:
            if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
                what = f"the head of the request took more than {seconds:g} seconds to arrive"
                self.transport.write(_last_words("Request Timeout", ApiError(what, status=408)))
            self.transport.close()

        def _refuse(self) -> None:
            self.refused = True
            what, code = (
                f"{most} connections are open, more than that this server does not take",
                "too_many_connections",
            )
            error = ApiError(what, code=code, status=503)
            self.transport.write(_last_words("Service Unavailable", error, "retry-after: 1\r\n"))
            self._count(owes=False)
            self.loop.call_later(LINGER_SECONDS, self.transport.close)

    return BoundedConnection


def _last_words(phrase: str, error: ApiError, more: str = "") -> bytes:
    """The answer to what is no request yet, after which the connection closes."""
    body = json.dumps(error_body(error)).encode()
    head = f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}{more}connection: close\r\n\r\n".encode() + body
