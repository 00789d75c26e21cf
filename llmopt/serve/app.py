"""The HTTP API: OpenAI's completions and chat completions, models, tokens, health, metrics, version, and the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from llmopt import __version__
from llmopt.errors import ExecutorError, LlmoptError
from llmopt.serve.answer import Answer, Caller, Model
from llmopt.serve.client import EngineClient
from llmopt.serve.document import openapi_document
from llmopt.serve.errors import ApiError
from llmopt.serve.gate import Gate
from llmopt.serve.health import Canary, DeepHealth
from llmopt.serve.http import ClientGone, EventStream, Worker, error_response, unless_gone
from llmopt.serve.logs import Log
from llmopt.serve.metrics import ServerMetrics
from llmopt.serve.page import add_page
from llmopt.serve.requests import ChatRequest, CompletionRequest, GenerationRequest, parse_request
from llmopt.serve.security import ApiKeys
from llmopt.serve.tokens import detokenize, tokenize

CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True)
class Access:
    """Who may ask, from where, and where it is written down. ``origins``: pages of other sites that may (CORS)."""

    keys: ApiKeys = field(default_factory=lambda: ApiKeys({}))
    origins: tuple[str, ...] = ()
    log: Log = field(default_factory=lambda: Log(enabled=False))


def build_app(model: Model, client: EngineClient, access: Access, canary: Canary) -> ASGIApp:
    """The application over one model and the engine process that runs it."""
    app = FastAPI(title="llmopt", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    metrics = ServerMetrics(lambda: client.stats, lambda: client.alive)
    worker = Worker(model.limits)
    _add_generation(app, model, client, metrics, worker)
    _add_models(app, model)
    _add_tokens(app, model, worker)
    _add_operations(app, client, metrics, DeepHealth(client, canary))
    add_page(app)
    _add_error_handlers(app)
    gate: ASGIApp = Gate(app, access.keys, metrics, access.log)
    if not access.origins:
        return gate
    origins, headers = list(access.origins), ["authorization", "content-type", "x-request-id"]
    return CORSMiddleware(gate, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)


def _add_generation(app: FastAPI, model: Model, client: EngineClient, metrics: ServerMetrics, worker: Worker) -> None:
    async def answer(request: Request, kind: type[GenerationRequest]) -> Response:
        caller = Caller(getattr(request.state, "tenant", ""), request.state.request_id)

        def read(body: Any) -> tuple[bool, Answer]:
            parsed = parse_request(kind, body)
            if client.failure is not None:
                raise client.failure
            return bool(parsed.stream), Answer(parsed, model, client, caller, metrics)

        stream, found = await worker.on_body(request, read)
        request.state.answer = found
        if stream:
            return EventStream(found.events())
        return JSONResponse(await unless_gone(request.receive, found.whole()))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatRequest)


def _add_models(app: FastAPI, model: Model) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(model)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model.name:
            raise ApiError(f"the model {name!r} does not exist", param="model", code="model_not_found", status=404)
        return _model_card(model)


def _add_tokens(app: FastAPI, model: Model, worker: Worker) -> None:
    @app.post("/tokenize")
    async def to_tokens(request: Request) -> dict[str, Any]:
        return await worker.on_body(request, partial(tokenize, model=model))

    @app.post("/detokenize")
    async def to_text(request: Request) -> dict[str, Any]:
        return await worker.on_body(request, partial(detokenize, model=model))


def _add_operations(app: FastAPI, client: EngineClient, metrics: ServerMetrics, deep: DeepHealth) -> None:
    @app.get("/health")
    async def health() -> Response:
        if client.alive:
            return JSONResponse({"status": "ok", "active_requests": client.active})
        error = client.failure or ExecutorError("the engine is not running")
        return JSONResponse({"status": "dead", "error": str(error)}, 503)

    @app.get("/health/deep")
    async def deep_health() -> dict[str, Any]:
        return await deep.check()

    @app.get("/metrics")
    async def exposition() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> dict[str, Any]:
        return openapi_document(app)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(LlmoptError)
    async def typed(request: Request, error: LlmoptError) -> Response:
        return error_response(error)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(RecursionError)
    async def deep(request: Request, error: RecursionError) -> Response:
        return error_response(ApiError("the body is nested too deeply"))

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
