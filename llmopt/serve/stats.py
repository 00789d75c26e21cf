"""What the engine process counts, for /metrics and the page."""

from __future__ import annotations

from dataclasses import asdict

from llmopt.runtime.core import EngineCore


def engine_stats(core: EngineCore) -> dict[str, float]:
    """Gauges and counters of an engine, by name: the fields of the scheduler's Stats, and ``preemptions``."""
    stats = core.scheduler.stats()
    return {**asdict(stats), "preemptions": stats.preemptions}
