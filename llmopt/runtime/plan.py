"""What the scheduler hands out: a planned step, and what it has counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmopt.runtime.decoding import Drawn
from llmopt.runtime.protocol import Admission, SeqStep, StepBatch
from llmopt.runtime.sequence import Sequence


@dataclass(frozen=True)
class Plan:
    """A step to submit, the sequences it draws a token for, and which of those need a mask."""

    batch: StepBatch
    drawn: Drawn
    constrained: tuple[int, ...]


@dataclass(slots=True)
class Stats:
    """Gauges and counters.

    Now: ``running`` and ``waiting`` sequences, ``kv_blocks`` and ``kv_blocks_used`` (by running sequences) of the
    fullest state group, ``swapped_bytes`` in host memory. Since the start: ``preemptions``, of which ``recomputes``
    and ``swaps``; ``prompt_tokens`` admitted, of which ``cached_tokens`` came from the prefix cache.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    swapped_bytes: int = 0
    recomputes: int = 0
    swaps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def preemptions(self) -> int:
        """Sequences that had to give up their blocks."""
        return self.recomputes + self.swaps


@dataclass(slots=True)
class StepRows:
    """Rows gathered so far; tokens left for prompts; sequences left."""

    room: int
    sequences: int
    rows: list[SeqStep] = field(default_factory=list)
    admit: list[Admission] = field(default_factory=list)
    drawing: list[Sequence] = field(default_factory=list)

    @property
    def open(self) -> bool:
        return self.room > 0 and self.sequences > 0
