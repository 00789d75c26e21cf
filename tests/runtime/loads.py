"""Engine cores over fake executors for scheduler tests, and what must hold of them at any time."""

from __future__ import annotations

from llmopt.runtime.core import EngineCore
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import ExecutorLimits, SamplingParams
from tests.runtime.clock import VirtualClock
from tests.runtime.fake import FakeExecutor

VOCAB = 97
GREEDY = SamplingParams(temperature=0)


def make(
    plan,
    blocks,
    *,
    context=64,
    sequences=4,
    step=16,
    depth=1,
    switch=None,
    eos=(),
    options=None,
    executor=FakeExecutor,
    ranged=False,
    buckets=(),
):
    """An engine core over a fake executor and a virtual clock (``core.clock``). ``blocks``: by group, in order."""
    counts = {g.name: blocks[i] for i, g in enumerate(plan.groups)}
    limits = ExecutorLimits(context, sequences, step, counts, VOCAB, switch, depth, ranged=ranged, row_buckets=buckets)
    return EngineCore(executor(plan, limits), eos, options=options or SchedulerOptions(), clock=VirtualClock())


def greedy(count, **more):
    """Parameters of a greedy request."""
    return GenerationParams(GREEDY, max_tokens=count, **more)


def drain(core, results, finished, check=lambda core: None, scores=None):
    """Step to the end, or fail; tokens by request go to ``results``, ends to ``finished``, reports to ``scores``."""
    for _ in range(2_000):
        if not core.has_work:
            return
        step(core, results, finished, scores)
        check(core)
    raise AssertionError("the engine does not come to an end")


def step(core, results, finished, scores=None):
    """One step. ``scores``: what was reported of prompts, by request."""
    for output in core.step():
        assert output.request_id not in finished, "output after the end"
        if output.prompt and scores is not None:
            assert output.request_id not in scores, "a second report"
            scores[output.request_id] = output.prompt
        results.setdefault(output.request_id, []).append(output.sampled.token)
        if output.finish_reason:
            finished[output.request_id] = output.finish_reason
    for failure in core.failures():
        assert failure.request_id not in finished, "a second end"
        finished[failure.request_id] = type(failure.error).__name__


def assert_sound(core):
    """Every block is free, or held by as many as say they hold it; no running sequence wastes a block."""
    scheduler = core.scheduler
    allocator, cache = scheduler.allocator, scheduler.cache
    for i, group in enumerate(allocator.groups):
        holders = [b for s in allocator.owners() for b in allocator.held(s)[group.name]]
        if group in cache.paged:
            at = cache.paged.index(group)
            holders += [b for node in nodes_of(cache) for b in node.blocks[at]]
            cached = [b for node in nodes_of(cache) for b in node.blocks[at]]
            assert len(set(cached)) == len(cached), "two nodes hold a block"
            idle = [b for node in nodes_of(cache) if not node.users for b in node.blocks[at]]
            assert cache.tree.idle[at] == len(idle), i
        else:
            holders += [s.blocks[group.name] for s in cache._snapshots]
        pool = allocator.pools[group.name]
        assert all(pool.references(b) == holders.count(b) for b in range(pool.total))
        assert pool.free == pool.total - len(set(holders))
    assert allocator.owners() == set(scheduler.running)
    assert set(scheduler.prefilling) | {s for s in scheduler.running if s in scheduler.decoding} == set(
        scheduler.running
    )
    assert scheduler.swap.used == sum(s.swapped for s in scheduler.sequences.values()) <= scheduler.swap.options.bytes
    for sequence in scheduler.running.values():
        for group in allocator.groups:
            if group.kind == "paged":
                held = len(allocator.held(sequence.seq_id)[group.name])
                # a step in flight may hold a row whose token is not known yet
                tokens = sequence.known + core.limits.steps_in_flight
                assert held * group.block_size < tokens + group.block_size


def nodes_of(cache):
    """Every node of the tree."""
    found, left = [], list(cache.tree._roots.values())
    while left:
        node = left.pop()
        found += node.children.values()
        left += node.children.values()
    return found


def assert_clean(core):
    """Nothing is left of any request, in the scheduler or the executor."""
    scheduler, executor = core.scheduler, core.executor
    assert core.active == 0
    assert not scheduler.allocator.owners()
    assert not scheduler.queue
    assert not scheduler.queue.shares._requests
    assert not scheduler.swap.used
    assert not executor.swapped
    assert not executor.known
    assert not executor.sampler._rows
    assert all(not node.users and node.owner is None for node in nodes_of(scheduler.cache))
    scheduler.cache.clear()
    assert scheduler.cache.tree.size == 0
    assert not scheduler.cache.tree._roots
    assert all(pool.free == pool.total for pool in scheduler.allocator.pools.values())


def until(tokens, eos):
    """Tokens up to and with the first end-of-sequence one."""
    ends = [i for i, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens
