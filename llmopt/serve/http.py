"""ASGI pieces the endpoints share: a body limit, JSON bodies, event streams that notice a client that left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llmopt.errors import LlmoptError
from llmopt.serve.errors import ApiError, error_body, error_headers, status_of

BODY_SECONDS = 60.0
"""How long a body may take to arrive."""

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


def error_response(error: LlmoptError) -> JSONResponse:
    """An error as OpenAI clients expect it."""
    return JSONResponse(error_body(error), status_of(error), error_headers(error))


async def json_body(request: Request, limit: int) -> Any:
    """The decoded body; raises ApiError when it has over ``limit`` bytes, does not arrive in time, or is not JSON."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise ApiError(f"the body is larger than {limit} bytes", code="body_too_large", status=413)
                parts.append(part)
    except TimeoutError as error:
        raise ApiError(f"the body took more than {BODY_SECONDS:g} seconds to arrive", status=408) from error
    except ClientDisconnect as error:
        raise ClientGone from error
    try:
        return json.loads(b"".join(parts).decode())
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8: byte {error.start} is {error.object[error.start]:#x}") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from error


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
