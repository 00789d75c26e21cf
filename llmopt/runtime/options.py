"""How an engine schedules: every choice with its default."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmopt.runtime.fairness import QueueOptions
from llmopt.runtime.swap import SwapOptions


@dataclass(frozen=True)
class SchedulerOptions:
    """How steps are made up.

    ``chunk``: most prompt tokens in a step that others decode in, which bounds what an arriving prompt costs them
    (None: whatever the step holds). ``step_tokens``: most tokens of a step (None: the executor's limit).
    ``prefix_cache``: keep and share states of equal prefixes.
    """

    chunk: int | None = 256
    step_tokens: int | None = None
    prefix_cache: bool = True
    queue: QueueOptions = field(default_factory=QueueOptions)
    swap: SwapOptions = field(default_factory=SwapOptions)
