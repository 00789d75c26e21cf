"""The HTTP API: OpenAI's completions and chat completions, models, health, version."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from llmopt import __version__
from llmopt.errors import ExecutorError, LlmoptError
from llmopt.serve.answer import Answer, Model
from llmopt.serve.client import EngineClient
from llmopt.serve.errors import ApiError
from llmopt.serve.http import ClientGone, EventStream, error_response, json_body, unless_gone
from llmopt.serve.page import add_page
from llmopt.serve.requests import ChatRequest, CompletionRequest, GenerationRequest, parse_request

CLIENT_CLOSED_REQUEST = 499


def build_app(model: Model, client: EngineClient) -> FastAPI:
    """The application over one model and the engine process that runs it."""
    app = FastAPI(title="llmopt", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    async def answer(request: Request, kind: type[GenerationRequest]) -> Response:
        parsed = parse_request(kind, await json_body(request))
        if client.failure is not None:
            raise client.failure
        # Tokenizing a long prompt takes a while: other requests go on meanwhile.
        found = await asyncio.to_thread(Answer, parsed, model, client)
        if parsed.stream:
            return EventStream(found.events())
        return JSONResponse(await unless_gone(request.receive, found.whole()))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatRequest)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(model)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model.name:
            raise ApiError(f"the model {name!r} does not exist", param="model", code="model_not_found", status=404)
        return _model_card(model)

    @app.get("/health")
    async def health() -> Response:
        if client.alive:
            return JSONResponse({"status": "ok", "active_requests": client.active})
        error = client.failure or ExecutorError("the engine is not running")
        return JSONResponse({"status": "dead", "error": str(error)}, 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    add_page(app)
    _add_error_handlers(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(LlmoptError)
    async def typed(request: Request, error: LlmoptError) -> Response:
        return error_response(error)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(ApiError(what, status=error.status_code))


def _model_card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "llmopt",
        "max_model_len": model.engine.context,
    }
