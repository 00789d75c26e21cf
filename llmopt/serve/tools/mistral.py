"""Mistral: ``[TOOL_CALLS]`` and a JSON list of calls."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from typing import ClassVar

from llmopt.serve.tools.base import ToolFormat, ToolParser
from llmopt.serve.tools.calls import CallsParser

OPEN = "[TOOL_CALLS]"


class Mistral(ToolFormat):
    """``[TOOL_CALLS][{"name": …, "arguments": {…}}, …]``."""

    name: ClassVar[str] = "mistral"
    key: ClassVar[str] = "arguments"
    markers: ClassVar[tuple[str, ...]] = (OPEN,)
    opening: ClassVar[str] = OPEN

    def taught_by(self, template: str) -> bool:
        """Its opening is in the template, and calls are a list (later models write ``[ARGS]``)."""
        return OPEN in template and "[ARGS]" not in template

    def parser(self) -> ToolParser:
        """Objects of the list."""
        return CallsParser(opening=OPEN, closing="]", key=self.key, between=" \t\r\n[,")

    def rest(self, literal: Mapping[str, str], many: bool) -> str:
        """The list."""
        return '"[" call (", " call)* "]"' if many else '"[" call "]"'

    def example(self) -> str:
        """A list of one call."""
        return f'{OPEN}[{{"name": NAME, "arguments": ARGUMENTS}}]'

    def new_id(self) -> str:
        """Mistral's templates accept nine letters and digits only."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


FORMAT = Mistral()
