"""Lengths in tokens, drawn from a distribution: ``512``, ``uniform:100:1024`` or ``lognormal:300:0.8:2048``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmopt.errors import ConfigError

FORMS = "write N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MAX]"


@dataclass(frozen=True)
class Lengths:
    """A distribution over whole numbers from 1. ``text``: as it was written."""

    text: str
    kind: str
    numbers: tuple[float, ...]

    @staticmethod
    def parse(text: str, where: str) -> Lengths:
        """The distribution ``text`` names; raises ConfigError naming ``where``."""
        kind, _, rest = text.partition(":") if ":" in text else ("fixed", "", text)
        try:
            numbers = tuple(float(part) for part in rest.split(":"))
            lengths = Lengths(text, kind, numbers)
            lengths._check()
        except ValueError as error:
            raise ConfigError(f"{text!r} is not a distribution of lengths", where=where, hint=FORMS) from error
        return lengths

    def _check(self) -> None:
        match self.kind, self.numbers:
            case "fixed", (length,):
                valid = length >= 1 and length == int(length)
            case "uniform", (low, high):
                valid = 1 <= low <= high < 2**31 and low == int(low) and high == int(high)
            case "lognormal", (median, sigma, *most):
                valid = median >= 1 and 0 <= sigma < 10 and len(most) <= 1 and all(m >= 1 for m in most)
            case _:
                valid = False
        if not valid:
            raise ValueError(self.kind)

    def draw(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """(count,) lengths."""
        if self.kind == "fixed":
            return np.full(count, int(self.numbers[0]))
        if self.kind == "uniform":
            return rng.integers(int(self.numbers[0]), int(self.numbers[1]), count, endpoint=True)
        median, sigma, *most = self.numbers
        drawn = np.exp(rng.normal(np.log(median), sigma, count))
        return np.clip(np.rint(drawn), 1, most[0] if most else 2**31).astype(np.int64)
