"""From a request to the grammar of its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from llmopt.runtime.params import Grammar
from llmopt.serve.errors import ApiError
from llmopt.serve.fields import JsonFormat, NamedTool, SchemaFormat, StructuredOutputs, Tool, choice_grammar
from llmopt.serve.requests import ChatRequest, GenerationRequest
from llmopt.serve.schemas import schema_source
from llmopt.serve.tools import ToolFormat, ToolSpec
from llmopt.serve.tools.constrain import tool_grammar

TokenOf = Callable[[str], int | None]


def request_grammar(request: GenerationRequest, form: ToolFormat, token_of: TokenOf) -> Grammar | None:
    """The grammar an answer must follow: of its response format, its structured outputs, or the calls it must make.

    Calls that are the model's own choice are constrained when one of the tools is ``strict``, or when only one call
    is allowed. ``token_of``: id of
    a marker that is one token of the vocabulary.
    """
    schema = _answer_schema(request)
    if isinstance(request, ChatRequest) and request.callable_tools:
        return _tools_grammar(request, form, token_of, schema)
    if schema is not None:
        return _json_grammar(schema)
    return None if request.structured_outputs is None else _structured(request.structured_outputs)


def grammar_param(request: GenerationRequest) -> str:
    """The field to blame for a grammar that does not compile."""
    if request.structured_outputs is not None:
        return "structured_outputs"
    return "response_format" if _answer_schema(request) is not None else "tools"


def _answer_schema(request: GenerationRequest) -> Mapping[str, Any] | None:
    match request.response_format:
        case JsonFormat():
            return {"type": "object"}
        case SchemaFormat(json_schema=named):
            return named.schema_
        case _:
            return None


def _json_grammar(schema: Mapping[str, Any]) -> Grammar:
    return Grammar("json_schema", schema_source(schema))


def _structured(wanted: StructuredOutputs) -> Grammar:
    if wanted.regex is not None:
        return Grammar("regex", wanted.regex)
    if wanted.choice is not None:
        return Grammar("lark", choice_grammar(wanted.choice))
    if wanted.grammar is not None:
        return Grammar("lark", wanted.grammar)
    assert wanted.json_ is not None
    schema = wanted.json_
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ApiError(f"structured_outputs.json is not JSON: {error}", param="structured_outputs") from error
        if not isinstance(schema, dict):
            raise ApiError("structured_outputs.json must be an object", param="structured_outputs")
    return _json_grammar(schema)


def _tools_grammar(
    request: ChatRequest, form: ToolFormat, token_of: TokenOf, answer: Mapping[str, Any] | None
) -> Grammar | None:
    tools, choice = request.callable_tools, request.tool_choice
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    must_call = choice == "required" or isinstance(choice, NamedTool)
    many = request.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    if many and not (must_call or answer is not None or any(tool.function.strict for tool in tools)):
        return None
    specs = [_spec(tool) for tool in tools]
    return tool_grammar(form, specs, token_of, must_call=must_call, many=many, answer=answer)


def _spec(tool: Tool) -> ToolSpec:
    return ToolSpec(tool.function.name, tool.function.parameters or {"type": "object", "properties": {}})
