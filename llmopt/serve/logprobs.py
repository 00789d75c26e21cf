"""Log-probabilities in the forms of OpenAI's two endpoints, and of vLLM for prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmopt.runtime.protocol import Sampled
from llmopt.runtime.stream import Delta
from llmopt.runtime.tokenizer import Tokenizer


def spoken(delta: Delta) -> tuple[Sampled, ...]:
    """Tokens of a delta that are part of the answer: all but the one that ended it."""
    return delta.tokens[:-1] if isinstance(delta.stop_reason, int) else delta.tokens


def chat_report(tokenizer: Tokenizer, deltas: Iterable[Delta]) -> dict[str, Any] | None:
    """The form of /v1/chat/completions; None when these deltas hold no token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    content = [
        {**entry(s.token, s.logprob or 0.0), "top_logprobs": [entry(i, logprob) for i, logprob in s.top]}
        for delta in deltas
        for s in spoken(delta)
    ]
    return {"content": content, "refusal": None} if content else None


def prompt_report(tokenizer: Tokenizer, prompt: Sequence[Sampled]) -> list[dict[str, Any] | None]:
    """vLLM's form: for each prompt token after the first, its own and the best log-probabilities by token id."""
    report: list[dict[str, Any] | None] = [None]
    for sampled in prompt[1:]:
        entries = {sampled.token: sampled.logprob, **dict(sampled.top)}
        report.append(
            {
                str(token): {"logprob": logprob, "decoded_token": token_text(tokenizer, token)}
                for token, logprob in entries.items()
            }
        )
    return report


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; bytes that are no text by themselves as OpenAI writes them (``bytes:\\xe2\\x82``)."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class LegacyReport:
    """The form of /v1/completions; offsets count the characters of the answer before each token."""

    def __init__(self, tokenizer: Tokenizer, offset: int) -> None:
        self._tokenizer, self._offset = tokenizer, offset
        self._text = tokenizer.stream()

    def take(self, tokens: Iterable[Sampled]) -> dict[str, Any] | None:
        """The report of the next tokens; None when there are none."""
        texts, offsets, logprobs, tops = [], [], [], []
        for sampled in tokens:
            text = token_text(self._tokenizer, sampled.token)
            texts.append(text)
            offsets.append(self._offset)
            logprobs.append(sampled.logprob)
            known = sampled.logprob is not None
            tops.append({token_text(self._tokenizer, i): p for i, p in sampled.top} if known else None)
            self._offset += len(self._text.push(sampled.token))
        if not texts:
            return None
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
