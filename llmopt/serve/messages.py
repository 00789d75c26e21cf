"""Messages of a conversation as OpenAI's API has them, made plain for chat templates."""

from __future__ import annotations

import json
from typing import Any, Literal

from llmopt.serve.fields import Strict


class CalledFunction(Strict):
    """Name and arguments (JSON in a string) of a call."""

    name: str
    arguments: str


class CalledTool(Strict):
    """A call an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def plain(self) -> dict[str, Any]:
        """For a template, which wants the arguments as an object: a string that is none stays a string."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except ValueError:
            arguments = self.function.arguments
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class Message(Strict):
    """One message; content is text or text parts. An assistant's may have calls instead, a tool's answers one."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """The message for a chat template; ``developer`` is the newer word for ``system``."""
        role = "system" if self.role == "developer" else self.role
        plain: dict[str, Any] = {"role": role, "content": "" if self.content is None else self.content}
        if self.name is not None:
            plain["name"] = self.name
        if self.tool_calls:
            plain["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        return plain
