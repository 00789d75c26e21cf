"""The token-level engine: scheduler and executor, token ids in and out."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmopt.errors import RequestError
from llmopt.runtime.grammar import Constraints, GrammarCompiler
from llmopt.runtime.params import GenerationParams, check_params, check_prompt, token_budget
from llmopt.runtime.protocol import Executor, Sampled, StepOutput
from llmopt.runtime.scheduler import Plan, Scheduler
from llmopt.runtime.scoring import PromptScores

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenOutput:
    """One new token of a request; ``finish_reason`` on its last one: ``stop`` when the token itself ends it.

    ``prompt``: log-probabilities of the prompt, with the first token of a request that asked for them.
    """

    request_id: int
    sampled: Sampled
    finish_reason: FinishReason | None = None
    prompt: tuple[Sampled, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A request that was accepted and had to be ended without an answer."""

    request_id: int
    error: RequestError


@dataclass(slots=True)
class _Request:
    stops: frozenset[int]
    left: int
    scores: PromptScores | None = None


class EngineCore:
    """Drives one executor. Not thread-safe.

    ``eos_token_ids`` end every request that does not say ``ignore_eos``. When the executor's limits allow two
    steps in flight, the next step is submitted before the last one is collected; a request that turns out to have
    ended then has run one row too many, whose token is discarded.
    """

    def __init__(
        self, executor: Executor, eos_token_ids: Iterable[int] = (), grammars: GrammarCompiler | None = None
    ) -> None:
        self.executor = executor
        self.limits = executor.limits
        self.scheduler = Scheduler(executor.state_plan, executor.limits)
        self.context = self.scheduler.context
        self.eos_token_ids = frozenset(eos_token_ids)
        self._requests: dict[int, _Request] = {}
        self.constraints = Constraints(grammars)
        self._failures: list[Failure] = []
        self._flight: deque[tuple[int, Plan]] = deque()
        self._ids = 0

    def add(self, prompt: Sequence[int], params: GenerationParams) -> int:
        """Queue a request and return its id; raises RequestError when prompt or parameters are invalid."""
        check_params(params, self.limits.vocab_size)
        check_prompt(prompt, self.limits.vocab_size, self.context)
        sampling = params.sampling
        if sampling.seed is None:
            # Drawn here, not by the executor: a preempted request must draw the same tokens again.
            sampling = replace(sampling, seed=secrets.randbits(64))
        endless = params.ignore_eos and params.grammar is None
        stops = frozenset(params.stop_token_ids) | (frozenset() if endless else self.eos_token_ids)
        budget = token_budget(params, len(prompt), self.context)
        self._ids += 1
        if params.grammar is not None:
            self.constraints.add(self._ids, params.grammar)
        scores = None
        if params.prompt_logprobs is not None:
            scores = PromptScores(np.array(prompt, np.int64), params.prompt_logprobs)
        self._requests[self._ids] = _Request(stops, budget, scores)
        self.scheduler.add(
            self._ids,
            prompt,
            sampling,
            budget,
            constrained=params.grammar is not None,
            scored=scores is not None,
        )
        return self._ids

    def cancel(self, request_id: int) -> bool:
        """End a request without further output; False when it has already ended."""
        if self._requests.pop(request_id, None) is None:
            return False
        self._end(request_id)
        return True

    def _end(self, request_id: int) -> None:
        self._requests.pop(request_id, None)
        self.constraints.forget(request_id)
        self.scheduler.finish(request_id)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._flight) or self.scheduler.has_work

    @property
    def active(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def step(self) -> list[TokenOutput]:
        """Submit what can be submitted, collect the oldest step. Raises ExecutorError when the executor failed."""
        while len(self._flight) < self.limits.steps_in_flight and (plan := self.scheduler.plan()):
            batch = replace(plan.batch, masks=self.constraints.masks(plan.sampled))
            self._flight.append((self.executor.submit(batch), plan))
        if not self._flight:
            return []
        ticket, plan = self._flight.popleft()
        done = self.executor.collect(ticket)
        self._score(plan, done)
        outputs = (self._take(seq_id, done.sampled[seq_id]) for seq_id in plan.sampled)
        return [output for output in outputs if output is not None]

    def failures(self) -> list[Failure]:
        """Requests that had to be ended since the last call."""
        failed, self._failures = self._failures, []
        return failed

    def _score(self, plan: Plan, done: StepOutput) -> None:
        """Log-probabilities of the prompt rows of this step whose logits were asked for."""
        for row in plan.batch.rows:
            request = self._requests.get(row.seq_id)
            if row.logits == "all" and request is not None and request.scores is not None:
                request.scores.take(row.start, done.logits[row.seq_id])

    def _take(self, seq_id: int, sampled: Sampled) -> TokenOutput | None:
        if not self.scheduler.sampled(seq_id, sampled.token):
            return None
        request = self._requests[seq_id]
        if (error := self.constraints.accept(seq_id, sampled.token)) is not None:
            self._failures.append(Failure(seq_id, error))
            self._end(seq_id)
            return None
        request.left -= 1
        prompt: tuple[Sampled, ...] = ()
        if request.scores is not None:
            prompt, request.scores = request.scores.whole(), None
        reason: FinishReason | None = None
        if sampled.token in request.stops:
            reason = "stop"
        elif request.left == 0:
            reason = "length"
        if reason:
            self._end(seq_id)
        return TokenOutput(seq_id, sampled, reason, prompt)

    def close(self) -> None:
        """Free the executor."""
        self.constraints.close()
        self.executor.close()
