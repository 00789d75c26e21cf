"""Stop strings: found across token boundaries, cut from the text, held back while they may still come."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches a text for the first stop string to complete.

    Of several, the one that completes first wins; of those that complete at the same character, the longest. So
    the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(s) for s in stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The part of the text so far that is certain, and the stop string that has completed (then it ends there)."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(start + len(s), start, s) for s in self._stops if (start := self._held.find(s)) >= 0]
        if found:
            _, start, stop = min(found)
            kept, self._held = self._held[:start], ""
            return kept, stop
        safe = len(self._held) - self._overlap()
        kept, self._held = self._held[:safe], self._held[safe:]
        return kept, None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        kept, self._held = self._held, ""
        return kept

    def _overlap(self) -> int:
        """Length of the longest end of the held text that a stop string starts with."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
