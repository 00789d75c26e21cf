"""What a tool-call format is: how its calls are read from a text, and which grammar its calls follow."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llmopt.serve.schemas import moved, schema_source


@dataclass(frozen=True)
class ToolSpec:
    """A function a model may call. ``parameters``: JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class ToolDelta:
    """A piece of call ``index``: its ``name`` comes with the first one, its ``arguments`` (JSON) in pieces."""

    index: int
    name: str | None = None
    arguments: str = ""


class ToolParser(ABC):
    """Reads one answer as it comes. What is no call is content; nothing of the text is lost."""

    def __init__(self) -> None:
        self.calls = 0
        """Calls begun so far."""

    @abstractmethod
    def push(self, text: str) -> tuple[str, list[ToolDelta]]:
        """Content and pieces of calls that are certain now."""

    @abstractmethod
    def flush(self) -> tuple[str, list[ToolDelta]]:
        """The rest, at the end of the answer: an unfinished call whose name is unknown is content."""


class ToolFormat(ABC):
    """One format: calls are JSON objects with ``name`` and ``key``, and something around them.

    ``markers``: texts that may be single tokens of the vocabulary and must reach the parser.

    ``opening``: the marker calls begin with; empty when an answer is a call from its first character on.
    ``prose``: regular expression of an answer that is no call, where there is no opening to tell them apart.
    """

    name: ClassVar[str]
    key: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = ()
    opening: ClassVar[str] = ""
    prose: ClassVar[str] = r"(.|\n)*"

    @abstractmethod
    def taught_by(self, template: str) -> bool:
        """Whether a chat template's source asks its model for this format."""

    @abstractmethod
    def parser(self) -> ToolParser:
        """A parser for one answer."""

    def call(self, tool: ToolSpec, literal: Mapping[str, str]) -> str:
        """Lark expression of one call."""
        arguments = moved(tool.parameters, f"#/properties/{self.key}")
        fields = {"name": {"const": tool.name}, self.key: arguments}
        schema = {"type": "object", "properties": fields, "required": ["name", self.key], "additionalProperties": False}
        return f"%json {schema_source(schema)}"

    @abstractmethod
    def rest(self, literal: Mapping[str, str], many: bool) -> str:
        """Lark expression of all that follows the opening: one ``call``, or several.

        ``literal``: Lark expression of each marker.
        """

    @abstractmethod
    def example(self) -> str:
        """How a call to ``NAME`` with ``ARGUMENTS`` is written, for models whose template does not say."""

    def new_id(self) -> str:
        """Id of a call."""
        return f"call_{uuid.uuid4().hex[:24]}"
