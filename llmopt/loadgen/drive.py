"""Sends calls when they are due and watches itself: a client that lags measures itself, not the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from llmopt.loadgen.client import Client, Record
from llmopt.loadgen.workload import Call

Progress = Callable[[str, int, int], None]
PROBE_SECONDS = 0.005


@dataclass
class Overhead:
    """What the client itself cost. ``lags``: seconds by which a timer of 5 ms came late; ``cpu``: share of one core."""

    lags: list[float] = field(default_factory=list)
    cpu: float = 0.0


@dataclass
class Run:
    """Every request of one run and what the client cost. ``seconds``: from the start to the last answer."""

    records: list[Record]
    seconds: float
    overhead: Overhead


async def drive(
    client: Client, calls: Sequence[Call], concurrency: int | None = None, progress: Progress = lambda *_: None
) -> Run:
    """Send every call when it is due, at most ``concurrency`` at once (None: no limit), and wait for all answers.

    With a limit a call that is due waits for its turn; its record says when it was sent.
    """
    turn = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
    overhead, done = Overhead(), 0
    start, busy = time.perf_counter(), time.process_time()

    async def one(call: Call) -> Record:
        nonlocal done
        await asyncio.sleep(max(0.0, start + call.due - time.perf_counter()))
        async with turn:
            record = await client.send(call, start)
        done += 1
        progress("requests", done, len(calls))
        return record

    probe = asyncio.create_task(_probe(overhead.lags))
    try:
        records = await asyncio.gather(*(one(call) for call in calls))
    finally:
        probe.cancel()
        client.close()
    seconds = time.perf_counter() - start
    overhead.cpu = (time.process_time() - busy) / seconds
    return Run(list(records), seconds, overhead)


async def _probe(lags: list[float]) -> None:
    """How late the event loop runs what is due."""
    while True:
        due = time.perf_counter() + PROBE_SECONDS
        await asyncio.sleep(PROBE_SECONDS)
        lags.append(time.perf_counter() - due)
