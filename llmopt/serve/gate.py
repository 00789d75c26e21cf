"""The way into the application: request ids, API keys, counting and logging of every request."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmopt.serve.errors import ApiError
from llmopt.serve.http import error_response
from llmopt.serve.logs import Log
from llmopt.serve.metrics import ServerMetrics
from llmopt.serve.security import ApiKeys

GUARDED = ("/v1/", "/tokenize", "/detokenize")
"""What needs an API key, where there are any."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADER = "x-request-id"


class Gate:
    """Wraps the application. A request's id is the client's ``X-Request-Id`` if it is a plain word, else a new one."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: ServerMetrics, log: Log) -> None:
        self._app, self._keys, self._metrics, self._log = app, keys, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, begun, status = Headers(scope=scope), time.perf_counter(), 0
        state = _state(scope)
        given = headers.get(HEADER, "")
        state["request_id"] = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (HEADER.encode(), state["request_id"].encode())]
            await send(message)

        try:
            if scope["path"].startswith(GUARDED) and scope["method"] != "OPTIONS":
                state["tenant"] = self._keys.tenant(headers.get("authorization"))
            await self._app(scope, receive, answer)
        except ApiError as error:
            await error_response(error)(scope, receive, answer)
        finally:
            self._record(scope, state, status, time.perf_counter() - begun)

    def _record(self, scope: Scope, state: MutableMapping[str, Any], status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.answered(route, status)
        known = {"tenant": state["tenant"]} if state.get("tenant") else {}
        if (answer := state.get("answer")) is not None:
            known |= {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        self._log(
            "request",
            id=state["request_id"],
            method=scope["method"],
            path=scope["path"],
            status=status,
            seconds=round(seconds, 4),
            **known,
        )


def _state(scope: Scope) -> dict[str, Any]:
    state: dict[str, Any] = scope.setdefault("state", {})
    return state
