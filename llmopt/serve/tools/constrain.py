"""The grammar of an answer that may, or must, call tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmopt.runtime.params import Grammar
from llmopt.serve.schemas import schema_source
from llmopt.serve.tools.base import ToolFormat, ToolSpec


def schema_rule(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a Lark expression."""
    return "%json " + schema_source(schema)


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[ToolSpec],
    token_of: Callable[[str], int | None],
    *,
    must_call: bool,
    many: bool,
    answer: Mapping[str, Any] | None = None,
) -> Grammar:
    """Calls to ``tools`` only, their arguments following their schemas.

    ``token_of``: id of a marker that is one token. Unless a call is a ``must``, the answer may also be text, or JSON
    that follows the schema ``answer``. ``many``: several calls are allowed.
    """
    literal = {marker: _literal(marker, token_of(marker)) for marker in form.markers}
    lines = [f"rest: {form.rest(literal, many)}"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    lines += [f"call_{i}: {form.call(tool, literal)}" for i, tool in enumerate(tools)]
    calls = f"{literal[form.opening]} rest" if form.opening else "rest"
    if must_call:
        start = calls
    elif answer is not None:
        start = f"answer | {calls}"
        lines.append(f"answer: {schema_rule(answer)}")
    else:
        start = "text | " + _after_text(form, token_of, lines)
        lines += ["text: TEXT", f"TEXT: /{form.prose}/"]
    return Grammar("lark", "\n".join([f"start: {start}", *lines]))


def _after_text(form: ToolFormat, token_of: Callable[[str], int | None], lines: list[str]) -> str:
    """Calls with text before them."""
    if not form.opening:
        return "rest"
    token = token_of(form.opening)
    if token is not None:
        return f"TEXT <[{token}]> rest"
    lines.append(f"lead[lazy]: TEXT {json.dumps(form.opening)}")
    return "lead rest"


def _literal(marker: str, token: int | None) -> str:
    """A marker as its one token where there is one, and as text."""
    text = json.dumps(marker)
    return text if token is None else f"(<[{token}]> | {text})"
