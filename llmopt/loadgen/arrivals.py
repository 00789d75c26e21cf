"""When requests arrive: all at once, evenly, as a Poisson process, or in bursts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


def poisson(rng: np.random.Generator, count: int, rate: float, burst: int) -> Times:
    """Independent arrivals: exponential gaps of mean 1 / rate."""
    return np.cumsum(rng.exponential(1 / rate, count))


def constant(rng: np.random.Generator, count: int, rate: float, burst: int) -> Times:
    """One arrival every 1 / rate seconds."""
    return np.arange(count) / rate


def bursts(rng: np.random.Generator, count: int, rate: float, burst: int) -> Times:
    """Bursts of ``burst`` requests at one moment; the moments are a Poisson process, the mean rate is kept."""
    moments = np.cumsum(rng.exponential(burst / rate, math.ceil(count / burst)))
    return np.repeat(moments, burst)[:count]


PROCESSES: dict[str, Callable[[np.random.Generator, int, float, int], Times]] = {
    "poisson": poisson,
    "constant": constant,
    "burst": bursts,
}


def arrival_times(process: str, rng: np.random.Generator, count: int, rate: float, burst: int = 1) -> Times:
    """Seconds (count,) after the start at which requests are due, ascending, the first at 0.

    ``rate``: requests a second; infinite means all at once, whatever the process.
    """
    if math.isinf(rate):
        return np.zeros(count)
    times = PROCESSES[process](rng, count, rate, burst)
    shifted: Times = times - times[0]
    return shifted
