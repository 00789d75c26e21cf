"""The token-level engine: scheduler and executor, token ids in and out."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmopt.errors import DeadlineError, RequestError
from llmopt.runtime.allowed import Bitmask
from llmopt.runtime.clock import Clock, Pace
from llmopt.runtime.grammar import Constraints, GrammarCompiler
from llmopt.runtime.late import LateMasks
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.params import GenerationParams, check_params, check_prompt, token_budget
from llmopt.runtime.plan import Plan
from llmopt.runtime.protocol import NO_TOKEN, Executor, Sampled, StepBatch, StepOutput
from llmopt.runtime.scheduler import Scheduler
from llmopt.runtime.scoring import PromptScores
from llmopt.runtime.sequence import Sequence as Scheduled

FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class TokenOutput:
    """One new token of a request; ``finish_reason`` on its last one: ``stop`` when the token itself ends it.

    ``prompt``: log-probabilities of the prompt, with the first token of a request that asked for them. With the first
    token ``cached``, how many tokens of the prompt were in the prefix cache, and ``waited``, seconds in the queue.
    """

    request_id: int
    sampled: Sampled
    finish_reason: FinishReason | None = None
    prompt: tuple[Sampled, ...] = ()
    cached: int | None = None
    waited: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A request that was accepted and had to be ended without an answer."""

    request_id: int
    error: RequestError


@dataclass(slots=True)
class _Request:
    """A request that has not ended. ``output``: its sequence's."""

    output: list[int]
    budget: int
    stops: frozenset[int]
    scores: PromptScores | None = None


@dataclass(slots=True)
class _Flight:
    """A submitted step: which one it is, the executor's ticket, and when it was submitted (seconds)."""

    number: int
    ticket: int
    plan: Plan
    submitted: float


class EngineCore:
    """Drives one executor. Not thread-safe.

    ``eos_token_ids`` end every request that does not say ``ignore_eos``. When the executor's limits allow two
    steps in flight, the next step is submitted before the last one is collected; a request that turns out to have
    ended then has run one row too many, whose token is discarded. ``clock`` is what deadlines, ageing and measured
    rates go by.
    """

    def __init__(
        self,
        executor: Executor,
        eos_token_ids: Iterable[int] = (),
        grammars: GrammarCompiler | None = None,
        options: SchedulerOptions | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.executor = executor
        self.limits = executor.limits
        self.clock = clock
        self.scheduler = Scheduler(executor.state_plan, executor.limits, options, clock)
        self.context = self.scheduler.context
        self.eos_token_ids = frozenset(eos_token_ids)
        self._requests: dict[int, _Request] = {}
        self.constraints = Constraints(grammars, ahead=self.limits.spare_core)
        self._failures: list[Failure] = []
        self._flight: deque[_Flight] = deque()
        self._early: list[TokenOutput] = []
        self._steps = 0
        self._collected = 0.0
        self._pace = Pace(clock)
        self._ids = 0

    def add(self, prompt: Sequence[int], params: GenerationParams) -> int:
        """Queue a request and return its id.

        Raises RequestError when prompt or parameters are invalid, QueueFullError when no more may wait.
        """
        check_params(params, self.limits.vocab_size)
        check_prompt(prompt, self.limits.vocab_size, self.context)
        self.scheduler.queue.check(params.tenant, self._pace.retry_after(len(self.scheduler.queue)))
        sampling = params.sampling
        if sampling.seed is None:
            # Drawn here, not by the executor: a preempted request must draw the same tokens again.
            sampling = replace(sampling, seed=secrets.randbits(64))
        endless = params.ignore_eos and params.grammar is None
        stops = frozenset(params.stop_token_ids) | (frozenset() if endless else self.eos_token_ids)
        self._ids += 1
        if params.grammar is not None:
            self.constraints.add(self._ids, params.grammar)
        sequence = Scheduled(
            self._ids,
            np.array(prompt, np.int64),
            sampling,
            token_budget(params, len(prompt), self.context),
            constrained=params.grammar is not None,
            scored=params.prompt_logprobs is not None,
            priority=params.priority,
            tenant=params.tenant,
            salt=params.cache_salt,
            deadline=None if params.timeout is None else self.clock() + params.timeout,
        )
        scores = None
        if params.prompt_logprobs is not None:
            scores = PromptScores(sequence.prompt, params.prompt_logprobs)
        self._requests[self._ids] = _Request(sequence.output, sequence.budget, stops, scores)
        self.scheduler.add(sequence)
        return self._ids

    def cancel(self, request_id: int) -> bool:
        """End a request without further output; False when it has already ended."""
        if request_id not in self._requests:
            return False
        self._end(request_id)
        return True

    def _end(self, request_id: int) -> None:
        del self._requests[request_id]
        self.constraints.forget(request_id)
        self.scheduler.finish(request_id)
        self._pace.ended()

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._flight or self._early) or self.scheduler.has_work

    @property
    def active(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def step(self) -> list[TokenOutput]:
        """Submit what can be submitted, collect the oldest step. Raises ExecutorError when the executor failed."""
        for request_id in self.scheduler.expired():
            self._fail(request_id, DeadlineError("the request's time was up", retry_after=self._pace.retry_after(1)))
        while not self._early and len(self._flight) < self.limits.steps_in_flight and (plan := self.scheduler.plan()):
            self._submit(plan)
        if self._early or not self._flight:
            outputs, self._early = self._early, []
            return outputs
        return self._collect()

    def _submit(self, plan: Plan) -> None:
        self._steps += 1
        batch = plan.batch
        if plan.constrained:
            masks = self._masks(plan.constrained, self._steps)
            batch = StepBatch(batch.rows, batch.admit, batch.release, batch.ops, masks, batch.decode)
        ticket = self.executor.submit(batch)
        self._flight.append(_Flight(self._steps, ticket, plan, self.clock()))

    def _masks(self, seq_ids: Sequence[int], number: int) -> Mapping[int, Bitmask]:
        """Masks for step ``number``. With steps in flight before it the executor starts its forward pass, and reads
        them while that runs: which collects those steps, so that a constrained sequence runs ahead like any other."""
        if not self._flight:
            return self.constraints.masks(seq_ids)

        def settle() -> Mapping[int, Bitmask]:
            while self._flight and self._flight[0].number < number:
                self._early += self._collect()
            return self.constraints.masks(seq_ids)

        return LateMasks(seq_ids, -(-self.limits.vocab_size // 32), settle)

    def _collect(self) -> list[TokenOutput]:
        """Wait for the oldest step."""
        flight = self._flight.popleft()
        done = self.executor.collect(flight.ticket)
        began, self._collected = max(flight.submitted, self._collected), self.clock()
        if flight.plan.batch.rows:
            self.scheduler.took(flight.plan, self._collected - began)
            self._score(flight.plan, done)
        return self._take(flight.plan, done)

    def failures(self) -> list[Failure]:
        """Requests that had to be ended since the last call."""
        failed, self._failures = self._failures, []
        return failed

    def _fail(self, request_id: int, error: RequestError) -> None:
        self._failures.append(Failure(request_id, error))
        self._end(request_id)

    def _score(self, plan: Plan, done: StepOutput) -> None:
        """Log-probabilities of the prompt rows of this step whose logits were asked for."""
        for row in plan.batch.rows:
            request = self._requests.get(row.seq_id)
            if row.logits == "all" and request is not None and request.scores is not None:
                request.scores.take(row.start, done.logits[row.seq_id])

    def _take(self, plan: Plan, done: StepOutput) -> list[TokenOutput]:
        """Outputs of a step: one for each drawn token whose request has not ended."""
        seq_ids, here = plan.drawn.seq_ids.tolist(), self.scheduler.learn(plan.drawn).tolist()
        requests, drawn, outputs = self._requests, _in_order(seq_ids, done), []
        refused = self._accept(plan, seq_ids, drawn) if plan.constrained else {}
        for seq_id, sampled, alive in zip(seq_ids, drawn, here):
            if not alive:
                continue
            request = requests[seq_id]
            token, output = sampled.token, request.output
            if seq_id in refused:
                self._fail(seq_id, refused[seq_id])
                continue
            if token == NO_TOKEN:
                self._fail(seq_id, RequestError("no token is allowed", hint="the grammar or the bias forbids all"))
                continue
            output.append(token)
            if 1 < len(output) < request.budget and token not in request.stops:
                outputs.append(TokenOutput(seq_id, sampled))
            else:
                outputs.append(self._take_one(seq_id, request, sampled))
        return outputs

    def _accept(self, plan: Plan, seq_ids: Sequence[int], drawn: Sequence[Sampled]) -> Mapping[int, RequestError]:
        """Why sequences cannot go on with what a step drew for them, of those that are constrained."""
        constrained = frozenset(plan.constrained)
        return self.constraints.accept({i: s.token for i, s in zip(seq_ids, drawn) if i in constrained})

    def _take_one(self, seq_id: int, request: _Request, sampled: Sampled) -> TokenOutput:
        """The output of a token that may begin or end its request."""
        reason: FinishReason | None = None
        if sampled.token in request.stops:
            reason = "stop"
        elif len(request.output) == request.budget:
            reason = "length"
        output = TokenOutput(seq_id, sampled, reason)
        if len(request.output) == 1:
            sequence = self.scheduler.sequences[seq_id]
            output.cached, output.waited = sequence.cached, sequence.waited
            if request.scores is not None:
                output.prompt = request.scores.whole()
        if reason is not None:
            self._end(seq_id)
        return output

    def close(self) -> None:
        """Free the executor."""
        self.constraints.close()
        self.executor.close()


def _in_order(seq_ids: list[int], done: StepOutput) -> list[Sampled]:
    """What a step drew for each sequence, decode rows first."""
    if done.tokens is None:
        return [done.sampled[seq_id] for seq_id in seq_ids]
    tokens, more = [Sampled(token) for token in done.tokens.tolist()], done.sampled
    rest = seq_ids[len(tokens) :]
    if len(more) > len(rest):
        tokens = [more.get(seq_id, plain) for seq_id, plain in zip(seq_ids, tokens)]
    return tokens + [more[seq_id] for seq_id in rest]
