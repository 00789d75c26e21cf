"""Response bodies of the OpenAI API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmopt.runtime.protocol import Sampled
from llmopt.runtime.stream import Delta
from llmopt.runtime.tokenizer import Tokenizer


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


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class ChoiceWriter:
    """Writes one choice, whole or in chunks. ``logprobs``: whether they were asked for."""

    def __init__(self, index: int, tokenizer: Tokenizer, *, chat: bool, logprobs: bool) -> None:
        self._index, self._tokenizer, self._chat, self._logprobs = index, tokenizer, chat, logprobs
        self._offset = 0

    def first_chunk(self, echo: str) -> dict[str, Any] | None:
        """What a stream sends before any token: the role of a chat message, or the echoed prompt."""
        if self._chat:
            return self._choice({"delta": {"role": "assistant", "content": ""}}, None, None)
        self._offset = len(echo)
        return self._choice({"text": echo}, None, None) if echo else None

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """One delta, or None when it has nothing to say."""
        logprobs = self._report([delta])
        if not (delta.text or delta.finish_reason or logprobs):
            return None
        content = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        return self._choice({"delta": content} if self._chat else {"text": delta.text}, logprobs, delta.finish_reason)

    def whole(self, deltas: Sequence[Delta], echo: str) -> dict[str, Any]:
        """The finished choice."""
        text = "".join(delta.text for delta in deltas)
        self._offset = len(echo)
        message = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return self._choice(
            message if self._chat else {"text": echo + text}, self._report(deltas), deltas[-1].finish_reason
        )

    def _choice(self, content: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": self._index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _report(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        """Log-probabilities of the tokens whose text these deltas hold."""
        if not self._logprobs:
            return None
        tokens = [t for delta in deltas for t in spoken(delta)]
        if self._chat:
            return {"content": [self._chat_token(t) for t in tokens], "refusal": None} if tokens else None
        return self._legacy(tokens)

    def _chat_token(self, sampled: Sampled) -> dict[str, Any]:
        top = [self._token(i, logprob) for i, logprob in sampled.top]
        return {**self._token(sampled.token, sampled.logprob or 0.0), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    def _legacy(self, tokens: Iterable[Sampled]) -> dict[str, Any] | None:
        """The form of /v1/completions; offsets count the characters of the answer before each token."""
        texts, offsets, logprobs, tops = [], [], [], []
        for sampled in tokens:
            text = self._text(sampled.token)
            texts.append(text)
            offsets.append(self._offset)
            logprobs.append(sampled.logprob)
            tops.append({self._text(i): logprob for i, logprob in sampled.top})
            self._offset += len(text)
        if not texts:
            return None
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _text(self, token: int) -> str:
        """A token's text; bytes that are no text by themselves as OpenAI writes them (``bytes:\\xe2\\x82``)."""
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def spoken(delta: Delta) -> tuple[Sampled, ...]:
    """Tokens of a delta that are part of the answer: all but the one that ended it."""
    return delta.tokens[:-1] if isinstance(delta.stop_reason, int) else delta.tokens
