"""How an engine schedules: every choice with its default."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmopt.errors import ConfigError
from llmopt.runtime.fairness import QueueOptions
from llmopt.runtime.swap import SwapOptions


@dataclass(frozen=True)
class SchedulerOptions:
    """How steps are made up.

    ``chunk``: most prompt tokens in a step that others decode in, which bounds what an arriving prompt costs them
    (None: whatever the step holds); more where the executor would pad the step up to so many rows. ``step_tokens``:
    most tokens of a step (None: the executor's limit).
    ``prefix_cache``: keep and share states of equal prefixes.
    """

    chunk: int | None = 256
    step_tokens: int | None = None
    prefix_cache: bool = True
    queue: QueueOptions = field(default_factory=QueueOptions)
    swap: SwapOptions = field(default_factory=SwapOptions)

    def __post_init__(self) -> None:
        """Raises ConfigError naming the first value out of its range."""
        queue, swap = self.queue, self.swap
        least = {
            "chunk": (self.chunk, 1),
            "step_tokens": (self.step_tokens, 1),
            "max_waiting": (queue.max_waiting, 1),
            "max_waiting_per_tenant": (queue.max_waiting_per_tenant, 1),
            "prompt_weight": (queue.prompt_weight, 0),
            "output_weight": (queue.output_weight, 0),
            "swap bytes": (swap.bytes, 0),
        }
        for name, (value, bound) in least.items():
            if value is not None and not value >= bound:
                raise ConfigError(f"{name} must be at least {bound}, not {value}")
        rates = {
            "aging_seconds": queue.aging_seconds,
            "bytes_per_second": swap.bytes_per_second,
            "tokens_per_second": swap.tokens_per_second,
        }
        for name, rate in rates.items():
            if not rate > 0:
                raise ConfigError(f"{name} must be above 0, not {rate}")
