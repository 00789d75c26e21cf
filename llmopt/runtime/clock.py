"""Time as the scheduler sees it: a function that returns seconds, and how fast requests end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Clock: TypeAlias = Callable[[], float]
"""Seconds since an arbitrary start; never goes back (``time.monotonic``)."""


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
