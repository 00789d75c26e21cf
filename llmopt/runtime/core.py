"""The token-level engine: scheduler and executor, token ids in and out."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llmopt.runtime.params import GenerationParams, check_params, check_prompt, token_budget
from llmopt.runtime.protocol import Executor, Sampled
from llmopt.runtime.scheduler import Plan, Scheduler

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenOutput:
    """One new token of a request; ``finish_reason`` on its last one: ``stop`` when the token itself ends it."""

    request_id: int
    sampled: Sampled
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class _Request:
    stops: frozenset[int]
    left: int


class EngineCore:
    """Drives one executor. Not thread-safe.

    ``eos_token_ids`` end every request that does not say ``ignore_eos``. When the executor's limits allow two
    steps in flight, the next step is submitted before the last one is collected; a request that turns out to have
    ended then has run one row too many, whose token is discarded.
    """

    def __init__(self, executor: Executor, eos_token_ids: Iterable[int] = ()) -> None:
        self.executor = executor
        self.limits = executor.limits
        self.scheduler = Scheduler(executor.state_plan, executor.limits)
        self.context = self.scheduler.context
        self.eos_token_ids = frozenset(eos_token_ids)
        self._requests: dict[int, _Request] = {}
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
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        budget = token_budget(params, len(prompt), self.context)
        self._ids += 1
        self._requests[self._ids] = _Request(stops, budget)
        self.scheduler.add(self._ids, prompt, sampling, budget)
        return self._ids

    def cancel(self, request_id: int) -> bool:
        """End a request without further output; False when it has already ended."""
        if self._requests.pop(request_id, None) is None:
            return False
        self.scheduler.finish(request_id)
        return True

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
            self._flight.append((self.executor.submit(plan.batch), plan))
        if not self._flight:
            return []
        ticket, plan = self._flight.popleft()
        drawn = self.executor.collect(ticket).sampled
        outputs = (self._take(seq_id, drawn[seq_id]) for seq_id in plan.sampled)
        return [output for output in outputs if output is not None]

    def _take(self, seq_id: int, sampled: Sampled) -> TokenOutput | None:
        if not self.scheduler.sampled(seq_id, sampled.token):
            return None
        request = self._requests[seq_id]
        request.left -= 1
        reason: FinishReason | None = None
        if sampled.token in request.stops:
            reason = "stop"
        elif request.left == 0:
            reason = "length"
        if reason:
            del self._requests[seq_id]
            self.scheduler.finish(seq_id)
        return TokenOutput(seq_id, sampled, reason)

    def close(self) -> None:
        """Free the executor."""
        self.executor.close()
