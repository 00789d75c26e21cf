"""Deep health: a known prompt through the whole engine, its tokens compared with the artifact's golden ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmopt.errors import ExecutorError
from llmopt.runtime.params import MAX_PRIORITY, GenerationParams
from llmopt.runtime.protocol import SamplingParams
from llmopt.serve.client import TokenSource

if TYPE_CHECKING:
    from llmopt.artifact.manifest import Golden

LEAD = 2.0
"""Lead (in logits) from which a choice counts as certain: no rounding turns it, whatever else runs."""
TOKENS = 4
"""Tokens of the canary at most."""


@dataclass(frozen=True)
class Canary:
    """A prompt and the greedy tokens that must follow; none when no golden choice is certain."""

    prompt: tuple[int, ...]
    expected: tuple[int, ...]

    @staticmethod
    def of(golden: Iterable[Golden], context: int) -> Canary:
        """The golden prompt with most certain tokens at its start; the shortest text there is without any."""
        best = Canary((0,), ())
        for entry in golden:
            certain = 0
            while certain < min(TOKENS, len(entry["tokens"])) and entry["margins"][certain] >= LEAD:
                certain += 1
            if certain > len(best.expected) and len(entry["prompt"]) + certain < context:
                best = Canary(tuple(entry["prompt"]), tuple(entry["tokens"][:certain]))
        return best


class DeepHealth:
    """Runs the canary, at most once every ``every`` seconds, whoever asks; ``patience``: seconds it may take."""

    def __init__(self, source: TokenSource, canary: Canary, every: float = 10.0, patience: float = 30.0) -> None:
        self._source, self._canary, self._every, self._patience = source, canary, every, patience
        self._lock = asyncio.Lock()
        self._last: tuple[float, dict[str, Any]] | None = None

    async def check(self) -> dict[str, Any]:
        """What was found. Raises ExecutorError when tokens do not come in time, or are wrong."""
        async with self._lock:
            if self._last is not None and time.monotonic() - self._last[0] < self._every:
                return self._last[1]
            begun = time.monotonic()
            try:
                async with asyncio.timeout(self._patience):
                    tokens = await self._run()
            except TimeoutError as error:
                raise ExecutorError(f"no answer to the canary within {self._patience:g} seconds") from error
            expected = list(self._canary.expected)
            if tokens[: len(expected)] != expected:
                raise ExecutorError(f"the canary's tokens are {tokens}, {expected} were expected")
            seconds = round(time.monotonic() - begun, 4)
            found = {"status": "ok", "canary_tokens": len(tokens), "compared": len(expected), "seconds": seconds}
            self._last = (time.monotonic(), found)
            return found

    async def _run(self) -> list[int]:
        count = max(1, len(self._canary.expected))
        greedy = SamplingParams(temperature=0)
        params = GenerationParams(greedy, count, ignore_eos=True, priority=-MAX_PRIORITY, tenant="canary")
        async with aclosing(self._source.generate(list(self._canary.prompt), params)) as outputs:
            return [output.sampled.token async for output in outputs]
