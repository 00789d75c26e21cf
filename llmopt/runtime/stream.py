"""One request's way from tokens to text: detokenization, stop strings, log-probabilities in step with the text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from llmopt.runtime.core import FinishReason, TokenOutput
from llmopt.runtime.detokenize import TextStream
from llmopt.runtime.protocol import Sampled
from llmopt.runtime.stopping import StopMatcher


@dataclass(frozen=True)
class Delta:
    """What a token added: text that is certain, and the tokens that text begins with.

    ``finish_reason`` is set on the last one. ``stop_reason`` then says which stop string or token id ended it (None:
    the length did). A token that ends a request is among ``tokens``; tokens of a matched stop string are not.
    ``prompt``: the prompt's tokens with their log-probabilities, on the first delta of a request that asked for them.
    """

    text: str
    tokens: tuple[Sampled, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt: tuple[Sampled, ...] = ()


class RequestStream:
    """Turns a request's token outputs into deltas."""

    def __init__(self, decoder: TextStream, stops: Sequence[str]) -> None:
        self._decoder, self._matcher = decoder, StopMatcher(stops)
        self._waiting: deque[tuple[int, Sampled]] = deque()
        self._decoded = self._emitted = 0
        self.count = 0
        """Tokens generated so far, those of a stop string included."""
        self.cached = 0
        """Prompt tokens that were in the prefix cache, known with the first token."""

    def push(self, output: TokenOutput) -> Delta:
        """The delta of one token."""
        self.count += 1
        if output.cached is not None:
            self.cached = output.cached
        reason = output.finish_reason
        self._waiting.append((self._decoded, output.sampled))
        text = "" if reason == "stop" else self._decoder.push(output.sampled.token)
        if reason:
            text += self._decoder.flush()
        self._decoded += len(text)
        text, hit = self._matcher.push(text)
        if hit is not None:
            return Delta(text, self._tokens(len(text)), "stop", hit, output.prompt)
        if reason:
            text += self._matcher.flush()
        tokens = self._tokens(len(text), everything=reason is not None)
        stop = output.sampled.token if reason == "stop" else None
        return Delta(text, tokens, reason, stop, output.prompt)

    def _tokens(self, new: int, everything: bool = False) -> tuple[Sampled, ...]:
        """Tokens whose text begins before the end of what is emitted now."""
        self._emitted += new
        ready = []
        while self._waiting and (everything or self._waiting[0][0] < self._emitted):
            ready.append(self._waiting.popleft()[1])
        return tuple(ready)
