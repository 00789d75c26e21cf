"""Who goes next: shares, priorities, ageing, bounds, deadlines."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import ConfigError, DeadlineError, QueueFullError
from llmopt.runtime.core import EngineCore
from llmopt.runtime.fairness import QueueOptions, TenantShares
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.swap import SwapOptions
from tests.runtime.clock import VirtualClock
from tests.runtime.fake import oracle, plan_of
from tests.runtime.loads import VOCAB, assert_clean, assert_sound, drain, greedy, make, step
from tests.runtime.timed import TimedExecutor


def queue(**options):
    """Scheduler options with these of the queue."""
    return SchedulerOptions(queue=QueueOptions(**options))


def order_of_ends(core, limit=2000):
    """Request ids in the order they end; the clock goes on a second a step."""
    ended = []
    for _ in range(limit):
        if not core.has_work:
            return ended
        ended += [output.request_id for output in core.step() if output.finish_reason]
        core.clock.advance(1.0)
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, not 0"),
        ({"step_tokens": 0}, "step_tokens must be at least 1"),
        ({"queue": QueueOptions(max_waiting=0)}, "max_waiting must be at least 1"),
        ({"queue": QueueOptions(max_waiting_per_tenant=-1)}, "max_waiting_per_tenant"),
        ({"queue": QueueOptions(aging_seconds=0)}, "aging_seconds must be above 0, not 0"),
        ({"queue": QueueOptions(aging_seconds=float("nan"))}, "aging_seconds"),
        ({"queue": QueueOptions(output_weight=-1)}, "output_weight must be at least 0"),
        ({"swap": SwapOptions(bytes=-1)}, "swap bytes must be at least 0"),
        ({"swap": SwapOptions(bytes_per_second=0)}, "bytes_per_second must be above 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SchedulerOptions(**options)


def test_a_flood_of_one_key_does_not_delay_another():
    core = make(plan_of("paged"), [40], sequences=1, options=queue(aging_seconds=1e9))
    flood = [core.add([i + 1] * 5, greedy(3, tenant="flood")) for i in range(20)]
    core.step()
    other = [core.add([50 + i] * 5, greedy(3, tenant="other")) for i in range(3)]
    ended = order_of_ends(core)
    assert ended[0] == flood[0]
    places = [ended.index(i) for i in other]
    assert places == [1, 3, 5] or places == [1, 2, 4]
    assert [i for i in ended if i in flood] == flood


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4))
def test_two_busy_keys_get_equal_shares(short, long, sequences):
    """While both have requests waiting, their weighted service differs by less than what may run at once."""
    clock = VirtualClock()
    options = queue(aging_seconds=1e9)
    core = EngineCore(TimedExecutor(clock, sequences=sequences), options=options, clock=clock)
    sizes = {"a": short, "b": long}
    for tenant, size in sizes.items():
        for _ in range(60):
            core.add(list(range(1, 20)), greedy(size, tenant=tenant))
    shares, most = core.scheduler.queue.shares, 20 + 2 * 61
    for _ in range(40):
        core.step()
        if min(core.scheduler.queue._waiting[t] for t in sizes) == 0:
            break
        assert abs(shares.served["a"] - shares.served["b"]) <= 2 * most * (sequences + 1)


def test_an_absence_saves_nothing_up():
    shares = TenantShares()
    for tenant in "ab":
        shares.enter(tenant)
    shares.exit("b")
    shares.charge("a", 1000.0)
    shares.enter("b")
    assert shares.served["b"] == 1000.0
    shares.exit("a")
    shares.exit("b")
    shares.enter("c")
    assert shares.served["c"] == 1000.0


@pytest.mark.parametrize(("aging", "starves"), [(20.0, False), (1e9, True)])
def test_waiting_is_worth_priority(aging, starves):
    """Urgent requests come for ever; an unimportant one gets through if, and only if, it gains by waiting."""
    core = make(plan_of("paged"), [40], sequences=2, options=queue(aging_seconds=aging))
    humble = core.add([9] * 9, greedy(8, priority=5))
    ended = set()
    for now in range(300):
        if core.active < 5:
            core.add([now % 90 + 1] * 5, greedy(4, priority=0))
        ended |= {output.request_id for output in core.step() if output.finish_reason}
        core.clock.advance(1.0)
    assert (humble not in ended) == starves


def test_a_better_priority_preempts_and_nothing_is_lost():
    plan = plan_of("paged")
    core = make(plan, [16], sequences=2, options=queue(aging_seconds=1e9))
    humble = [core.add([i + 1] * 9, greedy(30, priority=1)) for i in range(2)]
    results, finished = {}, {}
    for _ in range(5):
        step(core, results, finished)
    urgent = core.add([7] * 20, greedy(3, priority=0))
    for _ in range(6):
        step(core, results, finished)
        assert_sound(core)
    assert list(finished) == [urgent]
    drain(core, results, finished)
    assert core.scheduler.stats().preemptions >= 1
    assert [results[i] for i in humble] == [oracle([i + 1] * 9, 30, plan, VOCAB) for i in range(2)]
    assert_clean(core)


def test_who_is_preempted_does_not_pay_twice():
    core = make(plan_of("paged"), [16], options=queue(aging_seconds=1e9))
    for i in range(4):
        core.add([i + 1] * 9, greedy(40, tenant="a"))
    core.add([9], greedy(63, tenant="b", priority=1))  # keeps the counters alive
    while sum(r.tenant == "a" for r in core.scheduler.sequences.values()):
        core.step()
    assert core.scheduler.stats().preemptions > 0
    weights = core.scheduler.options.queue
    assert core.scheduler.queue.shares.served["a"] == 4 * (9 * weights.prompt_weight + 40 * weights.output_weight)


def test_equal_priorities_do_not_preempt():
    core = make(plan_of("paged"), [16], sequences=1, options=queue(aging_seconds=1.0))
    first, second = (core.add([i] * 5, greedy(20)) for i in (1, 2))
    assert order_of_ends(core) == [first, second]
    assert core.scheduler.stats().preemptions == 0


def test_the_queue_is_bounded_in_all_and_for_each_key():
    core = make(plan_of("paged"), [16], options=queue(max_waiting=5, max_waiting_per_tenant=3))
    kept = [core.add([1], greedy(2, tenant="a")) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests of this key wait already") as own:
        core.add([1], greedy(2, tenant="a"))
    kept += [core.add([1], greedy(2, tenant="b")) for _ in range(2)]
    with pytest.raises(QueueFullError, match="5 requests wait already") as everyones:
        core.add([1], greedy(2, tenant="c"))
    assert own.value.own
    assert not everyones.value.own
    assert 1 <= everyones.value.retry_after <= 60
    assert core.active == 5
    finished = {}
    drain(core, {}, finished)
    assert set(finished) == set(kept)
    core.add([1], greedy(2, tenant="c"))


def test_retry_after_follows_the_pace():
    core = make(plan_of("paged"), [16], options=queue(max_waiting=20), sequences=1)
    waits = []
    for seconds in (0.01, 30.0):
        for _ in range(20):
            core.add([1], greedy(1))
        with pytest.raises(QueueFullError) as full:
            core.add([1], greedy(1))
        waits.append(full.value.retry_after)
        while core.has_work:
            core.step()
            core.clock.advance(seconds)
    for _ in range(20):
        core.add([1], greedy(1))
    with pytest.raises(QueueFullError) as full:
        core.add([1], greedy(1))
    assert waits[1] < full.value.retry_after == 60


@pytest.mark.parametrize("depth", [1, 2])
def test_a_deadline_ends_a_request_once_waiting_or_running(depth):
    core = make(plan_of("paged"), [16], sequences=1, depth=depth)
    running = core.add([1] * 5, greedy(30, timeout=4.0))
    waiting = core.add([2] * 5, greedy(30, timeout=3.0))
    patient = core.add([3] * 5, greedy(3, timeout=100.0))
    ends = []
    for _ in range(20):
        ends += [o.request_id for o in core.step() if o.finish_reason]
        for failure in core.failures():
            assert isinstance(failure.error, DeadlineError)
            ends.append(failure.request_id)
        assert_sound(core)
        core.clock.advance(1.0)
    assert ends == [waiting, running, patient]
    assert_clean(core)
