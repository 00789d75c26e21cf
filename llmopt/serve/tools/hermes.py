"""Hermes and Qwen: ``<tool_call>`` around a JSON object each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from llmopt.serve.tools.base import ToolFormat, ToolParser
from llmopt.serve.tools.calls import CallsParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    """``<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>``, repeated for several calls."""

    name: ClassVar[str] = "hermes"
    key: ClassVar[str] = "arguments"
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)
    opening: ClassVar[str] = OPEN

    def taught_by(self, template: str) -> bool:
        """Its opening is in the template, and the call inside is JSON."""
        return OPEN in template and "<function=" not in template

    def parser(self) -> ToolParser:
        """Calls between the two tags."""
        return CallsParser(opening=OPEN, closing=CLOSE, key=self.key, between=" \t\r\n")

    def rest(self, literal: Mapping[str, str], many: bool) -> str:
        """The object and the closing tag; more calls have both tags."""
        one = f'"\\n" call "\\n" {literal[CLOSE]}'
        return f'{one} ("\\n" {literal[OPEN]} {one})*' if many else one

    def example(self) -> str:
        """A call between its tags."""
        return f'{OPEN}\n{{"name": NAME, "arguments": ARGUMENTS}}\n{CLOSE}'


FORMAT = Hermes()
