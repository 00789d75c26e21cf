"""The API's OpenAPI document: paths from the application, bodies from the request models."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from llmopt.serve.fields import Strict
from llmopt.serve.requests import ChatRequest, CompletionRequest
from llmopt.serve.tokens import DetokenizeRequest, TokenizeRequest

BODIES: dict[str, type[Strict]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
ERRORS = {
    "400": "The request is wrong",
    "401": "The API key is missing or wrong",
    "404": "No such model",
    "413": "The body is too large, or the text to tokenize",
    "429": "Too many requests wait",
    "503": "The engine is dead",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    document: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Error"] = ERROR
    refused = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"] |= {code: {"description": what, **refused} for code, what in ERRORS.items()}
            operation["responses"].pop("422", None)
            if path in BODIES:
                operation["requestBody"] = _body(BODIES[path], schemas)
    return document


def _body(model: type[Strict], schemas: dict[str, Any]) -> dict[str, Any]:
    """A request body; the models it is made of go among the document's schemas."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"required": True, "content": {"application/json": {"schema": reference}}}
