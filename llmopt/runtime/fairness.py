"""Who goes next: a bounded queue with priorities that rise by waiting, fair between tenants."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from dataclasses import dataclass

from llmopt.errors import QueueFullError
from llmopt.runtime.clock import Clock
from llmopt.runtime.sequence import Sequence

REMEMBERED = 4096
"""Tenants without requests whose counters are kept."""


@dataclass(frozen=True)
class QueueOptions:
    """Bounds and weights of the queue.

    ``max_waiting``: requests that may wait, of all tenants; ``max_waiting_per_tenant``: of one (None: no bound).
    ``aging_seconds``: waiting that long is worth one step of priority, so that nobody waits for ever.
    ``prompt_weight``, ``output_weight``: what a prompt token and a generated token cost a tenant.
    """

    max_waiting: int | None = None
    max_waiting_per_tenant: int | None = None
    aging_seconds: float = 30.0
    prompt_weight: float = 1.0
    output_weight: float = 2.0


class TenantShares:
    """Virtual token counters (Sheng et al., OSDI'24): what each tenant has been served, in weighted tokens.

    A tenant that comes back after a pause starts no lower than the least served of those who have requests: an
    absence saves nothing up.
    """

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self._requests: Counter[str] = Counter()
        self._floor = 0.0

    def enter(self, tenant: str) -> None:
        """A request of the tenant was accepted."""
        if not self._requests[tenant]:
            least = min((self.served[t] for t in self._requests if self._requests[t]), default=self._floor)
            self.served[tenant] = max(self.served.pop(tenant, 0.0), least)
        self._requests[tenant] += 1

    def exit(self, tenant: str) -> None:
        """A request of the tenant has ended."""
        self._requests[tenant] -= 1
        if not self._requests[tenant]:
            del self._requests[tenant]
            self._floor = self.served[tenant]
            while len(self.served) > REMEMBERED + len(self._requests):
                del self.served[next(t for t in self.served if t not in self._requests)]

    def charge(self, tenant: str, amount: float) -> None:
        """Weighted tokens served."""
        self.served[tenant] = self.served.get(tenant, 0.0) + amount


class WaitingQueue:
    """Sequences that wait, in lines by tenant and priority, each in order of arrival.

    First comes the lowest priority number, lowered by one for every ``aging_seconds`` of waiting; then the tenant
    served least; then who came first.
    """

    def __init__(self, options: QueueOptions, clock: Clock) -> None:
        self.options, self.clock = options, clock
        self.shares = TenantShares()
        self._lines: dict[tuple[str, int], list[Sequence]] = {}
        self._waiting: Counter[str] = Counter()
        self._parked: dict[int, Sequence] = {}
        self._levels: Counter[int] = Counter()
        self.changes = 0
        """How often the lines have changed."""

    def __len__(self) -> int:
        return self._waiting.total()

    def check(self, tenant: str, retry_after: float) -> None:
        """Raises QueueFullError when no more may wait."""
        options = self.options
        if options.max_waiting is not None and len(self) >= options.max_waiting:
            raise QueueFullError(f"{len(self)} requests wait already", retry_after=retry_after, hint="try again later")
        own = self._waiting[tenant]
        if options.max_waiting_per_tenant is not None and own >= options.max_waiting_per_tenant:
            raise QueueFullError(f"{own} requests of this key wait already", retry_after=retry_after, own=True)

    def push(self, sequence: Sequence) -> None:
        """Put a sequence in its line, at the place its arrival gives it."""
        self._line_up(sequence)
        self._waiting[sequence.tenant] += 1

    def _line_up(self, sequence: Sequence) -> None:
        line = self._lines.setdefault((sequence.tenant, sequence.priority), [])
        bisect.insort(line, sequence, key=lambda s: s.order)
        self._levels[sequence.priority] += 1
        self.changes += 1

    def best_priority(self) -> int | None:
        """The best priority that waits in line, ageing apart."""
        return min(self._levels, default=None)

    def first(self) -> Sequence | None:
        """Who goes next."""
        now = self.clock()
        served = self.shares.served
        heads = (line[0] for line in self._lines.values())
        return min(heads, key=lambda s: (self.urgency(s, now), served.get(s.tenant, 0.0), s.order), default=None)

    def urgency(self, sequence: Sequence, now: float) -> int:
        """Its priority, less a step for every ``aging_seconds`` since it came; lower is more urgent."""
        return sequence.priority - math.floor((now - sequence.arrival) / self.options.aging_seconds)

    def park(self, sequence: Sequence) -> None:
        """Let others pass until the chunk that the sequence ``awaits`` is settled."""
        self._step_out(sequence)
        self._parked[sequence.seq_id] = sequence

    def wake(self) -> None:
        """Back into their lines with those that need not wait any more."""
        for sequence in [s for s in self._parked.values() if s.awaits is None or s.awaits.settled]:
            del self._parked[sequence.seq_id]
            sequence.awaits = None
            self._line_up(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; raises ValueError when it does not wait."""
        if self._parked.pop(sequence.seq_id, None) is None:
            self._step_out(sequence)
        self._waiting[sequence.tenant] -= 1
        if not self._waiting[sequence.tenant]:
            del self._waiting[sequence.tenant]

    def _step_out(self, sequence: Sequence) -> None:
        key = (sequence.tenant, sequence.priority)
        line = self._lines.get(key, [])
        index = bisect.bisect_left(line, sequence.order, key=lambda s: s.order)
        if index == len(line) or line[index] is not sequence:
            raise ValueError(f"sequence {sequence.seq_id} does not wait")
        del line[index]
        if not line:
            del self._lines[key]
        self._levels[sequence.priority] -= 1
        if not self._levels[sequence.priority]:
            del self._levels[sequence.priority]
        self.changes += 1
