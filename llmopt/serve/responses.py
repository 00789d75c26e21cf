"""Response bodies of the OpenAI API."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmopt.runtime.stream import Delta
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.logprobs import LegacyReport, chat_report, prompt_report, spoken
from llmopt.serve.tools import ToolDelta, ToolFormat


@dataclass(frozen=True)
class Head:
    """What every body of one answer repeats."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: Sequence[dict[str, Any]], *, chunk: bool, usage: Any = None) -> dict[str, Any]:
        """A whole answer, or one chunk of a stream."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        body = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }
        return body if usage is None else {**body, "usage": usage}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Token counts; ``cached_tokens`` of the prompt were not computed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class ChoiceWriter(ABC):
    """Writes one choice, whole or in chunks."""

    def __init__(self, index: int) -> None:
        self._index = index

    @abstractmethod
    def first_chunk(self) -> dict[str, Any] | None:
        """What a stream sends before any token."""

    @abstractmethod
    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """One delta, or None when it has nothing to say."""

    @abstractmethod
    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The finished choice."""

    def _choice(self, content: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": reason}


class CompletionWriter(ChoiceWriter):
    """A choice of /v1/completions.

    ``echo``: the prompt's text, put in front; its log-probabilities come with the first delta when ``logprobs`` are
    asked for. ``scoring``: nothing but the prompt is wanted.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, *, logprobs: bool, echo: str, scoring: bool) -> None:
        super().__init__(index)
        self._tokenizer, self._logprobs, self._echo, self._scoring = tokenizer, logprobs, echo, scoring
        self._report = LegacyReport(tokenizer, 0 if logprobs else len(echo))

    def first_chunk(self) -> dict[str, Any] | None:
        """The echoed prompt, unless it waits for its log-probabilities."""
        if not self._echo or self._logprobs:
            return None
        echo, self._echo = self._echo, ""
        return self._choice({"text": echo}, None, None)

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """Text, and the log-probabilities of the tokens it begins with."""
        text, report = self._text([delta]), self._tokens([delta])
        if not (text or delta.finish_reason or report):
            return None
        return self._choice({"text": text}, report, delta.finish_reason)

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Text and log-probabilities of all."""
        choice = self._choice({"text": self._text(deltas)}, self._tokens(deltas), deltas[-1].finish_reason)
        if deltas[0].prompt:
            choice["prompt_logprobs"] = prompt_report(self._tokenizer, deltas[0].prompt)
        return choice

    def _text(self, deltas: Sequence[Delta]) -> str:
        echo, self._echo = self._echo, ""
        return echo if self._scoring else echo + "".join(delta.text for delta in deltas)

    def _tokens(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        said = [] if self._scoring else [t for delta in deltas for t in spoken(delta)]
        return self._report.take([*(t for delta in deltas for t in delta.prompt), *said])


class ChatWriter(ChoiceWriter):
    """A choice of /v1/chat/completions.

    ``form``: the format in which the answer may call tools (None: it has none to call). ``forced``: which one to call
    was the caller's decision, so that a call is no reason of its own for the answer's end.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, *, logprobs: bool, form: ToolFormat | None, forced: bool
    ) -> None:
        super().__init__(index)
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._form, self._forced = form, forced
        self._parser = None if form is None else form.parser()

    def first_chunk(self) -> dict[str, Any] | None:
        """The role."""
        return self._choice({"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """Content and pieces of calls."""
        content, calls = self._parse([delta])
        report = chat_report(self._tokenizer, [delta]) if self._logprobs else None
        if not (content or calls or delta.finish_reason or report):
            return None
        said: dict[str, Any] = {"content": content} if content or not (calls or delta.finish_reason) else {}
        if calls:
            said["tool_calls"] = [self._piece(call) for call in calls]
        return self._choice({"delta": said}, report, self._reason(delta))

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The message."""
        content, pieces = self._parse(deltas)
        report = chat_report(self._tokenizer, deltas) if self._logprobs else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if pieces:
            message["content"] = content or None
            message["tool_calls"] = self._calls(pieces)
        choice = self._choice({"message": message}, report, self._reason(deltas[-1]))
        if deltas[0].prompt:
            choice["prompt_logprobs"] = prompt_report(self._tokenizer, deltas[0].prompt)
        return choice

    def _parse(self, deltas: Sequence[Delta]) -> tuple[str, list[ToolDelta]]:
        text = "".join(delta.text for delta in deltas)
        if self._parser is None:
            return text, []
        content, calls = self._parser.push(text)
        if deltas[-1].finish_reason:
            more, last = self._parser.flush()
            content, calls = content + more, calls + last
        return content, calls

    def _piece(self, call: ToolDelta) -> dict[str, Any]:
        """A piece of a call, with its id and name when it is the first."""
        assert self._form is not None
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": call.index, "id": self._form.new_id(), "type": "function", "function": function}

    def _calls(self, pieces: Sequence[ToolDelta]) -> list[dict[str, Any]]:
        """Whole calls."""
        assert self._form is not None
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if piece.name is not None:
                function = {"name": piece.name, "arguments": ""}
                calls.append({"id": self._form.new_id(), "type": "function", "function": function})
            calls[piece.index]["function"]["arguments"] += piece.arguments
        return calls

    def _reason(self, delta: Delta) -> str | None:
        called = self._parser is not None and self._parser.calls > 0 and not self._forced
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
