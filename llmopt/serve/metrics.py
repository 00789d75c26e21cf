"""Prometheus metrics: what clients see, counted here, and what the engine counts, read from its last answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmopt.serve.observe import ChoiceWatch, Observer

FIRST_TOKEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Bucket bounds, in seconds."""

GAUGES = {
    "running": ("llmopt_requests_running", "Sequences that hold state"),
    "waiting": ("llmopt_requests_waiting", "Sequences that wait for room"),
    "kv_blocks": ("llmopt_kv_blocks", "Blocks of the fullest state group"),
    "kv_blocks_used": ("llmopt_kv_blocks_used", "Blocks of that group that running sequences hold"),
    "swapped_bytes": ("llmopt_swapped_bytes", "Host memory that preempted states take"),
}
COUNTERS = {
    "preemptions": ("llmopt_preemptions", "Sequences that had to give up their blocks"),
    "swaps": ("llmopt_swaps", "Preemptions whose state went to host memory"),
    "prompt_tokens": ("llmopt_prefix_tokens", "Prompt tokens looked up in the prefix cache"),
    "cached_tokens": ("llmopt_prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
}
"""The engine's values by their name in its stats."""


class ServerMetrics(Observer):
    """The metrics of one server. ``stats``: the engine's last; ``alive``: whether it can serve."""

    def __init__(self, stats: Callable[[], Mapping[str, float]], alive: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineValues(stats, alive))

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"llmopt_{name}_seconds", what, buckets=buckets, registry=self.registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"llmopt_{name}", what, labels, registry=self.registry)

        self.first = histogram("time_to_first_token", "From a choice's start to its first token", FIRST_TOKEN)
        self.between = histogram("inter_token_latency", "Between two tokens of a choice", BETWEEN_TOKENS)
        self.whole = histogram("request", "From a choice's start to its last token", WHOLE)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, once for each choice")
        self.generated = counter("generation_tokens", "Tokens generated")
        self.finished = counter("requests", "Choices that ended, by reason", "reason")
        self.answers = counter("http_requests", "HTTP requests answered, by route and status", "route", "status")

    def choice(self, prompt_tokens: int) -> ChoiceWatch:
        """Watch a choice."""
        self.prompt_tokens.inc(prompt_tokens)
        return _Watch(self)

    def answered(self, route: str, status: int) -> None:
        """An HTTP request has its answer."""
        self.answers.labels(route, str(status)).inc()

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _Watch(ChoiceWatch):
    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: float | None = None
        self._reason = "aborted"

    def token(self) -> None:
        """Time it."""
        now = time.perf_counter()
        if self._last is None:
            self._metrics.first.observe(now - self._start)
        else:
            self._metrics.between.observe(now - self._last)
        self._last = now
        self._metrics.generated.inc()

    def finish(self, reason: str) -> None:
        """Remember why."""
        self._reason = reason
        self._metrics.whole.observe(time.perf_counter() - self._start)

    def close(self) -> None:
        """Count the end."""
        self._metrics.finished.labels(self._reason).inc()


class _EngineValues(Collector):
    def __init__(self, stats: Callable[[], Mapping[str, float]], alive: Callable[[], bool]) -> None:
        self._stats, self._alive = stats, alive

    def collect(self) -> Iterator[Metric]:
        """The engine's gauges and counters."""
        stats = self._stats()
        yield GaugeMetricFamily("llmopt_engine_up", "Whether the engine can serve", value=float(self._alive()))
        for key, (name, what) in GAUGES.items():
            yield GaugeMetricFamily(name, what, value=stats.get(key, 0.0))
        for key, (name, what) in COUNTERS.items():
            yield CounterMetricFamily(name, what, value=stats.get(key, 0.0))
