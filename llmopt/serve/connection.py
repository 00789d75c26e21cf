"""HTTP connections that clients cannot hold by sending slowly: uvicorn's own have no deadline for a request's head."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmopt.serve.errors import ApiError, error_body


def timed_connections(seconds: float) -> type[H11Protocol]:
    """The protocol of connections that close when what a client owes does not arrive within ``seconds``.

    A client owes the head of its first request from the moment it connects, that of a later one from its first byte,
    and the rest of a body once its request has been answered (until then the endpoint that reads it counts).
    """

    class TimedConnection(H11Protocol):
        """One connection; ``deadline``: while the client owes something."""

        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """A client has connected."""
            super().connection_made(transport)
            self._count(owes=True)

        def connection_lost(self, exc: Exception | None) -> None:
            """It is gone."""
            self._count(owes=False)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """A piece of a request, or several requests."""
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
                self.transport.write(_too_late(seconds))
            self.transport.close()

    return TimedConnection


def _too_late(seconds: float) -> bytes:
    """The answer to half a head."""
    error = ApiError(f"the head of the request took more than {seconds:g} seconds to arrive", status=408)
    body = json.dumps(error_body(error)).encode()
    head = f"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body
