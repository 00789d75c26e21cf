"""Time that tests move by hand."""

from __future__ import annotations


class VirtualClock:
    """A clock that stands still until it is told how much time has passed."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass; raises ValueError for a negative amount."""
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s")
        self.now += seconds
