"""Mistral from tokenizer version 11 on: ``[TOOL_CALLS]name[ARGS]{…}`` for every call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

from llmopt.serve.schemas import schema_source
from llmopt.serve.tools.base import ToolDelta, ToolFormat, ToolParser, ToolSpec
from llmopt.serve.tools.calls import overlap
from llmopt.serve.tools.mistral import FORMAT as LISTED
from llmopt.serve.tools.scan import CallScanner

OPEN, ARGS = "[TOOL_CALLS]", "[ARGS]"


class _Parser(ToolParser):
    """Content, then a name and an object for every call."""

    def __init__(self) -> None:
        super().__init__()
        self._held = ""
        self._scanner: CallScanner | None = None

    def push(self, text: str) -> tuple[str, list[ToolDelta]]:
        """Content and pieces of calls that are certain now."""
        self._held += text
        content, deltas = "", list[ToolDelta]()
        while self._held:
            before = self._held
            if self._scanner is not None:
                self._read_arguments(self._scanner, deltas)
            elif self._held.startswith(OPEN):
                self._read_name(deltas)
            else:
                content += self._read_content()
            if self._held == before:
                break
        return content, deltas

    def flush(self) -> tuple[str, list[ToolDelta]]:
        """The rest: a call without its ``[ARGS]`` is content."""
        held, self._held = self._held, ""
        return "" if self.calls and not held.strip() else held, []

    def _read_content(self) -> str:
        start = self._held.find(OPEN)
        end = start if start >= 0 else len(self._held) - overlap(self._held, OPEN)
        said = self._held[:end].rstrip()
        self._held = self._held[end if start >= 0 else len(said) :]
        return said

    def _read_name(self, deltas: list[ToolDelta]) -> None:
        name, found, rest = self._held[len(OPEN) :].partition(ARGS)
        if found:
            self._scanner, self._held = CallScanner("arguments"), rest
            self._scanner.push(f'{{"name": {json.dumps(name.strip())}, "arguments": ')
            self.calls += 1
            deltas.append(ToolDelta(self.calls - 1, name.strip()))

    def _read_arguments(self, scanner: CallScanner, deltas: list[ToolDelta]) -> None:
        """Up to the bracket that closes the arguments, or the character that cannot stand in them."""
        end = 0
        while end < len(self._held) and not scanner.broken and not scanner.closed:
            scanner.push(self._held[end])
            end += not scanner.broken
        self._held = self._held[end:]
        if arguments := scanner.take_value():
            deltas.append(ToolDelta(self.calls - 1, arguments=arguments))
        if scanner.closed or scanner.broken:
            self._scanner = None


class MistralArgs(ToolFormat):
    """``[TOOL_CALLS]name[ARGS]{…}``, repeated for several calls."""

    name: ClassVar[str] = "mistral_args"
    key: ClassVar[str] = "arguments"
    markers: ClassVar[tuple[str, ...]] = (OPEN, ARGS)
    opening: ClassVar[str] = OPEN

    def taught_by(self, template: str) -> bool:
        """Both its markers are in the template."""
        return OPEN in template and ARGS in template

    def parser(self) -> ToolParser:
        """Names and arguments."""
        return _Parser()

    def call(self, tool: ToolSpec, literal: Mapping[str, str]) -> str:
        """The name, the marker, the arguments."""
        return f"{json.dumps(tool.name)} {literal[ARGS]} %json {schema_source(tool.parameters)}"

    def rest(self, literal: Mapping[str, str], many: bool) -> str:
        """One call, or more with their openings."""
        return f"call ({literal[OPEN]} call)*" if many else "call"

    def example(self) -> str:
        """A call."""
        return f"{OPEN}NAME{ARGS}ARGUMENTS"

    def new_id(self) -> str:
        """As in the older format."""
        return LISTED.new_id()


FORMAT = MistralArgs()
