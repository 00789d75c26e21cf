"""Errors of the API, with the status, type and code OpenAI clients expect."""

from __future__ import annotations

from typing import Any

from llmopt.errors import ArtifactError, ExecutorError, LlmoptError, RequestError


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
    """HTTP status of an error: the caller's fault is 400, a dead engine 503, anything else 500."""
    if isinstance(error, ApiError):
        return error.status
    if isinstance(error, RequestError):
        return 400
    return 503 if isinstance(error, ExecutorError) else 500


def error_body(error: LlmoptError) -> dict[str, Any]:
    """The JSON body of an error, as OpenAI spells it."""
    status = status_of(error)
    kind = {503: "service_unavailable", 500: "server_error", 404: "not_found_error"}.get(
        status, "invalid_request_error"
    )
    if isinstance(error, ArtifactError):
        kind = "server_error"
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
