"""Errors of the API, with the status, type and code OpenAI clients expect."""

from __future__ import annotations

import math
from typing import Any

from llmopt.errors import DeadlineError, ExecutorError, LlmoptError, OverloadError, RequestError


class ApiError(RequestError):
    """A request the API refuses. ``param`` names the field; ``status`` is the HTTP status."""

    def __init__(
        self,
        what: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, hint=hint)
        self.param, self.code, self.status = param, code, status


def status_of(error: LlmoptError) -> int:
    """HTTP status: 400 for the caller, 429 for a full queue, 504 for a missed deadline, 503 for a dead engine."""
    match error:
        case ApiError():
            return error.status
        case DeadlineError():
            return 504
        case OverloadError():
            return 429
        case RequestError():
            return 400
        case ExecutorError():
            return 503
        case _:
            return 500


KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}
"""The error's type by its status; any other is invalid_request_error."""
CODES = {429: "rate_limit_exceeded", 503: "engine_unavailable", 504: "deadline_exceeded"}


def error_body(error: LlmoptError) -> dict[str, Any]:
    """The JSON body of an error, as OpenAI spells it."""
    status = status_of(error)
    kind, code = KINDS.get(status, "invalid_request_error"), CODES.get(status)
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, code)
    return {"error": {"message": _clean(str(error)), "type": kind, "param": param and _clean(param), "code": code}}


def _clean(text: str) -> str:
    """Text that can be sent: a name may hold half a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_headers(error: LlmoptError) -> dict[str, str]:
    """Headers that say what to do: when to ask again, or how to say who asks."""
    if isinstance(error, OverloadError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, ExecutorError):
        return {"retry-after": "5"}
    return {"www-authenticate": "Bearer"} if status_of(error) == 401 else {}
