"""What happens to requests, told to whoever counts it."""

from __future__ import annotations


class ChoiceWatch:
    """Hears of one choice: that it began, each token, its end, and that nothing more will come."""

    def begin(self, waited: float) -> None:
        """It was ``waited`` seconds in the engine's queue; its first token is there."""

    def token(self) -> None:
        """A token has come."""

    def finish(self, reason: str) -> None:
        """It was the last one."""

    def close(self) -> None:
        """Nothing more will come: the choice is finished, has failed, or was given up."""


class Observer:
    """Hears of requests. This one counts nothing."""

    def choice(self, prompt_tokens: int) -> ChoiceWatch:
        """A choice begins."""
        return ChoiceWatch()
