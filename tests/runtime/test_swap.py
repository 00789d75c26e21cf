"""Preempted states in host memory: chosen by cost, bounded, dropped with their request, the same tokens after."""

import pytest

from llmopt.runtime.core import EngineCore
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.swap import SwapOptions, SwapSpace
from tests.runtime.clock import VirtualClock
from tests.runtime.fake import FakeExecutor, oracle, plan_of
from tests.runtime.loads import VOCAB, assert_clean, assert_sound, drain, greedy, make, step
from tests.runtime.timed import PROMPT_ROW, TimedExecutor

PROMPTS = [[i + 1] * 9 for i in range(4)]
FAST, SLOW = 1e12, 1.0


def swapping(size=1 << 20, speed=FAST):
    """Options with host memory for states."""
    return SchedulerOptions(swap=SwapOptions(bytes=size, bytes_per_second=speed))


def crowded(plan, options, depth=1, executor=FakeExecutor):
    """Four requests in a pool that holds less than two of them at their ends, run to their ends."""
    counts = [16 if g.kind == "paged" else 4 for g in plan.groups]
    core = make(plan, counts, depth=depth, options=options, executor=executor)
    ids = [core.add(p, greedy(40)) for p in PROMPTS]
    results = {}
    drain(core, results, {}, assert_sound)
    return core, [results[i] for i in ids]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kinds", [("paged",), ("paged", "ring"), ("paged", "slots", "ring")])
def test_swapped_sequences_say_the_same(kinds, depth):
    plan = plan_of(*kinds)
    core, results = crowded(plan, swapping(), depth)
    assert core.scheduler.stats().swaps > 0
    assert core.scheduler.stats().recomputes == 0
    assert results == [oracle(p, 40, plan, VOCAB) for p in PROMPTS]
    assert core.executor.rows <= 4 * (9 + 40 + depth - 1), "something was computed twice"
    assert_clean(core)


@pytest.mark.parametrize("switch", [9, 12, 20])
@pytest.mark.parametrize("drawn", range(13))
def test_a_state_of_the_other_rotary_table_is_not_swapped(switch, drawn):
    """A better request comes when the first one's known tokens, not yet its states, are too many for its table."""
    plan = plan_of("slots")
    core = make(plan, [1], switch=switch, options=swapping())
    results = {}
    first = core.add(PROMPTS[0], greedy(20, priority=1))
    while len(results.get(first, [])) < drawn:
        step(core, results, {})
    second = core.add(PROMPTS[1], greedy(20))
    drain(core, results, {}, assert_sound)
    stats, known = core.scheduler.stats(), len(PROMPTS[0]) + drawn
    assert (stats.swaps, stats.recomputes) == ((0, 0) if not drawn else (0, 1) if known == switch + 1 else (1, 0))
    assert [results[first], results[second]] == [oracle(p, 20, plan, VOCAB, switch) for p in PROMPTS[:2]]
    assert_clean(core)


def test_an_executor_that_loses_swapped_states_is_noticed():
    class Loses(FakeExecutor):
        def _apply(self, op):
            if op.kind == "swap_in":
                self.swapped.pop((op.group, op.key))
            else:
                super()._apply(op)

    plan = plan_of("paged")
    _, results = crowded(plan, swapping(), executor=Loses)
    assert results != [oracle(p, 40, plan, VOCAB) for p in PROMPTS]


@pytest.mark.parametrize(
    ("options", "swaps", "recomputes"),
    [(swapping(), True, False), (swapping(speed=SLOW), False, True), (swapping(size=0), False, True)],
)
def test_the_cheaper_way_is_taken(options, swaps, recomputes):
    stats = crowded(plan_of("paged"), options)[0].scheduler.stats()
    assert (stats.swaps > 0, stats.recomputes > 0) == (swaps, recomputes)


def test_host_memory_is_bounded():
    """Room for one state: the next one preempted is computed again."""
    plan = plan_of("paged")
    core, results = crowded(plan, swapping(size=150))
    stats = core.scheduler.stats()
    assert stats.swaps > 0
    assert stats.recomputes > 0
    assert results == [oracle(p, 40, plan, VOCAB) for p in PROMPTS]
    assert_clean(core)


def test_a_cancelled_request_leaves_no_state_behind():
    core = make(plan_of("paged"), [16], options=swapping())
    ids = [core.add(p, greedy(40)) for p in PROMPTS]
    results, finished = {}, {}
    while not core.scheduler.swap.used:
        step(core, results, finished)
    for seq_id in ids:
        core.cancel(seq_id)
    assert core.has_work, "the executor must hear of it"
    drain(core, results, finished)
    assert_clean(core)


def test_the_cost_model():
    group = plan_of("paged").groups[0]  # 4 tokens of 4 bytes a block
    space = SwapSpace(SwapOptions(bytes=64, bytes_per_second=1000.0, tokens_per_second=100.0), (group,))
    assert space.size(5) == 32
    assert not space.pays(0)
    assert not space.pays(5)  # 64 ms there and back, 50 ms to compute
    assert space.pays(8)  # 64 ms against 80 ms
    assert not space.pays(20), "more than the host may hold"
    space.hold(40)
    assert not space.pays(8)
    space.free(40)
    for _ in range(100):
        space.observe(1000, 1.0)
    assert space.tokens_per_second == pytest.approx(1000, rel=0.01)
    assert not space.pays(8), "computing has turned out to be fast"
    with pytest.raises(ValueError, match="freed twice"):
        space.free(1)


def test_the_rate_of_prefill_is_measured():
    clock = VirtualClock()
    core = EngineCore(TimedExecutor(clock, steps_in_flight=2), clock=clock)
    for i in range(200):
        core.add([i % 90 + 1] * 2000, greedy(1))
    while core.has_work:
        core.step()
    assert core.scheduler.swap.tokens_per_second == pytest.approx(1 / PROMPT_ROW, rel=0.1)
