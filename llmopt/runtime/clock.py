"""Time as the scheduler sees it: a function that returns seconds, and one that tests move by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Clock: TypeAlias = Callable[[], float]
"""Seconds since an arbitrary start; never goes back (``time.monotonic``)."""


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


class Pace:
    """How fast requests end, for telling callers when to come back."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._last = clock, clock()
        self._seconds = 1.0

    def ended(self) -> None:
        """A request has ended."""
        now = self._clock()
        # Pauses in which nobody asked for anything say nothing about the pace.
        self._seconds += 0.1 * (min(now - self._last, 60.0) - self._seconds)
        self._last = now

    def retry_after(self, waiting: int) -> float:
        """Seconds, from 1 to 60, in which about that many requests end."""
        return min(max(waiting * self._seconds, 1.0), 60.0)
