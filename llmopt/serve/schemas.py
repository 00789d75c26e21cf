"""JSON schemas made ready for a grammar: white space bounded, objects closed, references moved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

WHITESPACE = {"whitespace_pattern": r"( |\n[ \t]{0,20})?"}
"""Between the parts of JSON: a space, or a line's end and an indentation. Unbounded, some models never stop."""

_MANY = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties")


def schema_source(schema: Mapping[str, Any]) -> str:
    """The text of a schema for llguidance.

    An object that names its properties gets no others, unless its schema says so: JSON Schema would allow them, and a
    model has no reason to make them up. Schemas with ``allOf`` are left as they are: closing a part closes the whole.
    """
    plain = dict(schema)
    closed = plain if "allOf" in json.dumps(plain) else _mapped(plain, _close)
    return json.dumps({"x-guidance": WHITESPACE, **closed})


def moved(schema: Mapping[str, Any], root: str) -> dict[str, Any]:
    """A schema that has become a part of another: references to its root lead to ``root``, its new place."""

    def move(part: dict[str, Any]) -> dict[str, Any]:
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            part["$ref"] = root + reference[1:]
        return part

    found: dict[str, Any] = _mapped(dict(schema), move)
    return found


def _close(part: dict[str, Any]) -> dict[str, Any]:
    if "properties" in part and not any(key in part for key in _OPEN):
        part["additionalProperties"] = False
    return part


def _mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """``change`` applied to copies of a schema and of all schemas in it; other values as they are."""
    if not isinstance(schema, dict):
        return schema
    part = dict(schema)
    for key in _MANY:
        if isinstance(inner := part.get(key), dict):
            part[key] = {name: _mapped(value, change) for name, value in inner.items()}
    for key in _LISTS:
        if isinstance(inner := part.get(key), list):
            part[key] = [_mapped(value, change) for value in inner]
    for key in _ONE:
        if key in part:
            part[key] = _mapped(part[key], change)
    return change(part)
