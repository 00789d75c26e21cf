"""ASGI pieces the endpoints share: a body limit, JSON bodies, event streams that notice a client that left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llmopt.errors import LlmoptError
from llmopt.serve.errors import ApiError, error_body, error_headers, status_of
from llmopt.serve.limits import Limits
from llmopt.serve.process import return_memory

LARGE = 1 << 18
"""Bytes of a body that is worked on apart: reading 10 MB takes seconds, in which other requests come in."""
RETURN_SECONDS = 1.0
"""How long after the last large body its memory goes back to the system: a prompt of 10 MB takes 1.5 GB meanwhile."""

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


def error_response(error: LlmoptError) -> JSONResponse:
    """An error as OpenAI clients expect it."""
    return JSONResponse(error_body(error), status_of(error), error_headers(error))


class Worker:
    """Works on bodies in threads, large ones in one of their own: they wait for each other, others not for them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._large = ThreadPoolExecutor(1, "large")
        self._returning: asyncio.TimerHandle | None = None

    async def on_body(self, request: Request, work: Callable[[Any], T]) -> T:
        """``work`` on the decoded body. Raises ApiError when the body is too large, late or no JSON, and what ``work``
        raises."""
        body = bytearray()
        try:
            await _receive(request, self._limits, body)
            pool = self._large if len(body) > LARGE else None
            return await asyncio.get_running_loop().run_in_executor(pool, lambda: work(_decoded(body)))
        finally:
            if len(body) > LARGE:
                self._return_memory()

    def _return_memory(self) -> None:
        """Once no large body has come for a while: by then what was made of the last one is gone."""
        if self._returning is not None:
            self._returning.cancel()
        loop = asyncio.get_running_loop()
        self._returning = loop.call_later(RETURN_SECONDS, loop.run_in_executor, self._large, return_memory)


async def _receive(request: Request, limits: Limits, body: bytearray) -> None:
    """Fill ``body``; raises ApiError when it is too large or does not arrive in time."""
    seconds = limits.receive_seconds
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    what = f"the body is larger than {limits.body_bytes} bytes"
                    raise ApiError(what, code="body_too_large", status=413)
    except TimeoutError as error:
        raise ApiError(f"the body took more than {seconds:g} seconds to arrive", status=408) from error
    except ClientDisconnect as error:
        raise ClientGone from error


def _decoded(body: bytearray) -> Any:
    """A body's JSON; raises ApiError, not from the error at hand: that one keeps the whole text."""
    try:
        return json.loads(body.decode())
    except UnicodeDecodeError as error:
        what = f"the body is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
    except (ValueError, RecursionError) as error:
        what = f"the body is not JSON: {error}"
    raise ApiError(what)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves (then ClientGone is raised)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return await task
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from an async generator, which is closed as soon as the client leaves.

    An error it raises before its first event is the answer, with its own status.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        self.status_code, self.background, self._events = 200, None, events
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""

        started = False

        async def pump() -> None:
            nonlocal started
            async with aclosing(self._events) as events:
                async for event in events:
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, pump())
        except LlmoptError as error:
            if started:
                raise
            await error_response(error)(scope, receive, send)
        except (ClientGone, OSError):
            return  # nobody is left to tell
