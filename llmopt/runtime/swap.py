"""Preempted states in host memory: how much may lie there, and when that beats computing them again."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.program import StateGroup


@dataclass(frozen=True)
class SwapOptions:
    """Host memory for preempted states and what the choice between swapping and recomputing rests on.

    ``bytes``: host memory for states; 0 is never swap. ``bytes_per_second``: between device and host, each way.
    ``tokens_per_second``: prefill, until it has been measured.
    """

    bytes: int = 0
    bytes_per_second: float = 20e9
    tokens_per_second: float = 10_000.0


class SwapSpace:
    """Bounded accounting of swapped states, and the cost model."""

    def __init__(self, options: SwapOptions, groups: tuple[StateGroup, ...]) -> None:
        self.options, self.groups = options, groups
        self.allowed = options.bytes > 0 and all(g.swappable for g in groups) and bool(groups)
        self.tokens_per_second = options.tokens_per_second
        self.used = 0

    def size(self, tokens: int) -> int:
        """Bytes of the state of a sequence of ``tokens`` tokens."""
        return sum(g.blocks_for(tokens) * g.block_bytes() for g in self.groups)

    def pays(self, tokens: int) -> bool:
        """Whether swapping a state of ``tokens`` tokens out and in is allowed, fits, and beats computing it again."""
        size = self.size(tokens)
        if not self.allowed or not tokens or self.used + size > self.options.bytes:
            return False
        return 2 * size / self.options.bytes_per_second < tokens / self.tokens_per_second

    def hold(self, size: int) -> None:
        """A state of ``size`` bytes goes to the host."""
        self.used += size

    def free(self, size: int) -> None:
        """It has come back, or ended."""
        self.used -= size
        if self.used < 0:
            raise ValueError(f"{-self.used} bytes of swapped state are freed twice")

    def observe(self, tokens: int, seconds: float) -> None:
        """A step computed ``tokens`` rows in ``seconds``: the measured rate of prefill follows slowly."""
        if tokens > 0 and seconds > 0:
            self.tokens_per_second += 0.1 * (tokens / seconds - self.tokens_per_second)
