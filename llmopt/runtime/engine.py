"""The engine: prompts in, text and tokens out, over any executor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmopt.errors import RequestError
from llmopt.runtime.core import EngineCore
from llmopt.runtime.grammar import GrammarCompiler
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import Executor
from llmopt.runtime.stream import Delta, RequestStream
from llmopt.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Output:
    """What a step added to a request. ``completion_tokens``: tokens generated so far.

    ``error``: why a request that was accepted had to end without an answer; its last output, with an empty delta.
    """

    request_id: int
    delta: Delta
    prompt_tokens: int
    completion_tokens: int
    error: RequestError | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last output."""
        return self.error is not None or self.delta.finish_reason is not None


@dataclass(frozen=True)
class Completion:
    """A whole answer: its text, its tokens, and why it ended."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class _Request:
    prompt_tokens: int
    stream: RequestStream


class Engine:
    """Continuous batching over one executor, with text at both ends. Not thread-safe."""

    def __init__(self, executor: Executor, tokenizer: Tokenizer, eos_token_ids: Iterable[int] = ()) -> None:
        ends = tuple(eos_token_ids)
        self.core = EngineCore(executor, ends, GrammarCompiler(tokenizer, executor.limits.vocab_size, ends))
        self.tokenizer = tokenizer
        self._requests: dict[int, _Request] = {}

    def add(self, prompt: str | Sequence[int], params: GenerationParams) -> int:
        """Queue a prompt, as text or as token ids, and return the request's id; raises RequestError."""
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty")
            prompt = self.tokenizer.encode(prompt)
        request_id = self.core.add(prompt, params)
        self._requests[request_id] = _Request(len(prompt), RequestStream(self.tokenizer.stream(), params.stop))
        return request_id

    def cancel(self, request_id: int) -> bool:
        """End a request without further output; False when it has already ended."""
        self._requests.pop(request_id, None)
        return self.core.cancel(request_id)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self.core.has_work

    def step(self) -> list[Output]:
        """Run a step; one output for every request that got a token. Raises ExecutorError when the executor failed."""
        outputs = []
        for token in self.core.step():
            request = self._requests[token.request_id]
            delta = request.stream.push(token)
            if delta.finish_reason is not None:
                del self._requests[token.request_id]
                self.core.cancel(token.request_id)  # a stop string ends what the core still runs
            outputs.append(Output(token.request_id, delta, request.prompt_tokens, request.stream.count))
        for failure in self.core.failures():
            request = self._requests.pop(failure.request_id)
            count = request.stream.count
            outputs.append(Output(failure.request_id, Delta("", ()), request.prompt_tokens, count, failure.error))
        return outputs

    def generate(self, prompts: Sequence[str | Sequence[int]], params: GenerationParams) -> list[Completion]:
        """Complete several prompts and return the answers in order; raises RequestError before anything runs."""
        ids: list[int] = []
        try:
            for prompt in prompts:
                ids.append(self.add(prompt, params))
            parts: dict[int, list[Output]] = {i: [] for i in ids}
            while not all(outputs and outputs[-1].finished for outputs in parts.values()):
                for output in self.step():
                    if output.request_id in parts:
                        if output.error is not None:
                            raise output.error
                        parts[output.request_id].append(output)
        except BaseException:
            for request_id in ids:
                self.cancel(request_id)
            raise
        return [_join(parts[i]) for i in ids]

    def close(self) -> None:
        """Free the executor."""
        self.core.close()


def _join(outputs: Sequence[Output]) -> Completion:
    last = outputs[-1]
    return Completion(
        "".join(o.delta.text for o in outputs),
        tuple(t.token for o in outputs for t in o.delta.tokens),
        last.delta.finish_reason or "",
        last.prompt_tokens,
        last.completion_tokens,
    )
