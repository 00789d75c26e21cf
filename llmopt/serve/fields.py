"""Fields of requests that say what an answer must look like: tools, response formats, grammars."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9_.-]{1,64}$"
MAX_TOOLS, MAX_CHOICES, MAX_MESSAGES, MAX_PROMPTS = 128, 4096, 8192, 8192

T = TypeVar("T")
Many: TypeAlias = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at its first bad element: a body may hold a million, and an error for each."""


class Strict(BaseModel):
    """A JSON object without unknown fields, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Function(Strict):
    """A function the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """For a chat template."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class NamedFunction(Strict):
    """A function by its name."""

    name: str


class NamedTool(Strict):
    """``tool_choice`` of one tool."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict):
    """Anything."""

    type: Literal["text"]


class JsonFormat(Strict):
    """Some JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON schema with the name OpenAI's API wants it to have."""

    name: str = Field(default="answer", pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """What OpenAI's API has no field for; exactly one is given. ``json`` is a schema, as an object or as text."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Many[str] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = None

    def asked(self) -> list[str]:
        """Names of the fields that are given."""
        return [name for name in ("json_", "regex", "choice", "grammar") if getattr(self, name) is not None]


def choice_grammar(texts: list[str]) -> str:
    """A Lark grammar of exactly these texts."""
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
