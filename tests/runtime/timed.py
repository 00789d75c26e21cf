"""An executor that computes nothing and takes virtual time: for latency under a load, deterministically."""

from __future__ import annotations

from collections import deque

import numpy as np

from llmopt.runtime.protocol import ExecutorLimits, Sampled, StepBatch, StepOutput
from tests.runtime.clock import VirtualClock
from tests.runtime.fake import plan_of

STEP, PROMPT_ROW, DECODE_ROW = 4e-3, 50e-6, 10e-6
"""Seconds: of any step, and of each row in it."""


class TimedExecutor:
    """Works through steps one after the other; ``collect`` waits for its step."""

    def __init__(self, clock: VirtualClock, sequences=32, tokens=8192, steps_in_flight=2, blocks=10_000) -> None:
        self.clock, self.busy_until = clock, 0.0
        self.state_plan = plan_of("paged", block_size=16)
        self.limits = ExecutorLimits(8192, sequences, tokens, {"paged0": blocks}, 97, steps_in_flight=steps_in_flight)
        self.steps: deque[tuple[float, StepOutput]] = deque()
        self.largest = 0.0

    def submit(self, batch: StepBatch) -> int:
        rows = sum(row.query_len for row in batch.rows)
        decode = 0 if batch.decode is None else len(batch.decode)
        seconds = STEP + rows * PROMPT_ROW + decode * DECODE_ROW
        self.largest = max(self.largest, seconds)
        self.busy_until = max(self.busy_until, self.clock()) + seconds
        sampled = {row.seq_id: Sampled(5) for row in batch.rows if row.sample}
        self.steps.append((self.busy_until, StepOutput(sampled, tokens=np.full(decode, 5))))
        return 0

    def collect(self, ticket: int) -> StepOutput:
        done, output = self.steps.popleft()
        self.clock.advance(max(0.0, done - self.clock()))
        return output

    def close(self) -> None:
        pass
