"""Llama 3.1 and later: the whole answer is a JSON object, several are separated by semicolons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from llmopt.serve.tools.base import ToolDelta, ToolFormat, ToolParser
from llmopt.serve.tools.calls import CallsParser, overlap

TAG = "<|python_tag|>"


class _Parser(ToolParser):
    """Calls, with or without the tag in front."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = CallsParser(opening="", closing="", key="parameters", between=" \t\r\n;")
        self._start: str | None = ""

    def push(self, text: str) -> tuple[str, list[ToolDelta]]:
        """Content and pieces of calls that are certain now."""
        if self._start is not None:
            text = self._start + text
            start = text.lstrip()
            if start.startswith(TAG):
                text = start[len(TAG) :]
            elif overlap(start, TAG) == len(start):
                self._start = text
                return "", []
            self._start = None
        content, deltas = self._calls.push(text)
        self.calls = self._calls.calls
        return content, deltas

    def flush(self) -> tuple[str, list[ToolDelta]]:
        """The rest."""
        content, deltas = self._calls.flush()
        return (self._start or "") + content, deltas


class Llama3(ToolFormat):
    """``{"name": …, "parameters": {…}}``, after an optional ``<|python_tag|>``."""

    name: ClassVar[str] = "llama3"
    key: ClassVar[str] = "parameters"
    markers: ClassVar[tuple[str, ...]] = (TAG,)
    prose: ClassVar[str] = r"[^{\s](.|\n)*"

    def taught_by(self, template: str) -> bool:
        """The template knows the tag, or writes calls with ``parameters``."""
        return TAG in template or ('"parameters": ' in template and '"name": ' in template and "ipython" in template)

    def parser(self) -> ToolParser:
        """Calls from the first character on."""
        return _Parser()

    def rest(self, literal: Mapping[str, str], many: bool) -> str:
        """One object, or several between semicolons."""
        return 'call ("; " call)*' if many else "call"

    def example(self) -> str:
        """A call, which is the whole answer."""
        return '{"name": NAME, "parameters": ARGUMENTS}'


FORMAT = Llama3()
