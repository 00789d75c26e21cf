"""What an arriving prompt costs those who decode, under a virtual clock; the same run gives the same times."""

import numpy as np
import pytest

from llmopt.runtime.core import EngineCore
from llmopt.runtime.options import SchedulerOptions
from tests.runtime.clock import VirtualClock
from tests.runtime.loads import greedy
from tests.runtime.timed import PROMPT_ROW, STEP, TimedExecutor

CHUNK = 256
STREAMS = 16


def gaps(chunk, arrivals, depth=2):
    """Seconds between the tokens of 16 streams, while prompts of 2,000 tokens arrive every 40 steps."""
    clock = VirtualClock()
    core = EngineCore(TimedExecutor(clock, steps_in_flight=depth), options=SchedulerOptions(chunk=chunk), clock=clock)
    streams = {core.add([i + 1] * 20, greedy(300)): [] for i in range(STREAMS)}
    for step in range(280):
        if arrivals and step >= 40 and step % 40 == 0:
            core.add([50 + step // 40] * 2000, greedy(4))
        for output in core.step():
            if output.request_id in streams:
                streams[output.request_id].append(clock())
    return np.concatenate([np.diff(times[5:]) for times in streams.values()])


def p99(values):
    return float(np.quantile(values, 0.99))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_long_prompt_costs_the_others_one_chunk_at_most(depth):
    quiet, chunked, whole = gaps(CHUNK, False, depth), gaps(CHUNK, True, depth), gaps(None, True, depth)
    bound = p99(quiet) + CHUNK * PROMPT_ROW + 1e-9
    assert p99(chunked) <= bound
    assert chunked.max() <= bound
    assert p99(chunked) > p99(quiet) + CHUNK * PROMPT_ROW / 2, "the prompts did not meet the streams"
    assert p99(whole) > bound, "negative control: without chunks the bound must not hold"


def test_chunks_do_not_starve_the_prompt():
    """A prompt of 2,000 tokens is through after eight steps that carry a chunk of it."""
    clock = VirtualClock()
    core = EngineCore(TimedExecutor(clock, steps_in_flight=1), options=SchedulerOptions(chunk=CHUNK), clock=clock)
    for i in range(STREAMS):
        core.add([i + 1] * 20, greedy(300))
    for _ in range(10):
        core.step()
    late, start = core.add([60] * 2000, greedy(2)), clock()
    while all(output.request_id != late for output in core.step()):
        pass
    assert clock() - start <= 8 * (STEP + CHUNK * PROMPT_ROW + 32 * 10e-6)


def test_a_run_is_repeated_exactly():
    assert np.array_equal(gaps(CHUNK, True), gaps(CHUNK, True))


def test_admissions_leave_room_for_those_who_run():
    """A pool of half of what 64 sequences come to want: few are preempted, and the engine stays busy."""
    clock = VirtualClock()
    core = EngineCore(TimedExecutor(clock, sequences=64, blocks=600), clock=clock)
    rng = np.random.default_rng(0)
    for _ in range(100):
        core.add(rng.integers(0, 97, rng.integers(50, 300)).tolist(), greedy(int(rng.integers(50, 300))))
    while core.has_work:
        core.step()
    assert core.scheduler.stats().recomputes <= 15
