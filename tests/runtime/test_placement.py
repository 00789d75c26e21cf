"""Where calls cover a range of slots, sequences that run lie side by side, whatever the cache keeps between them."""

import numpy as np
import pytest

from llmopt.runtime.options import SchedulerOptions
from tests.runtime.fake import FakeExecutor, oracle, plan_of
from tests.runtime.loads import VOCAB, assert_clean, assert_sound, drain, greedy, make


class Spans(FakeExecutor):
    """Counts the slots its decode calls would cover."""

    covered = used = 0

    def submit(self, batch):
        if batch.decode is not None:
            slots = batch.decode.blocks["slots0"][:, 0]
            self.covered += int(np.ptp(slots)) + 1
            self.used += len(slots)
        return super().submit(batch)


def spread(streams, *, ranged, cache):
    """Slots covered for each slot used, by streams of unrelated requests over eight slots."""
    options = SchedulerOptions(prefix_cache=cache)
    core = make(plan_of("slots"), [8], sequences=8, options=options, executor=Spans, ranged=ranged)
    rng = np.random.default_rng(0)
    expected, results = {}, {}
    for _ in range(80):
        while core.active < streams:
            prompt, count = rng.integers(0, VOCAB, 20).tolist(), int(rng.integers(3, 20))
            expected[core.add(prompt, greedy(count))] = oracle(prompt, count, core.executor.state_plan, VOCAB)
        for output in core.step():
            results.setdefault(output.request_id, []).append(output.sampled.token)
        assert_sound(core)
    drain(core, results, {})
    assert results == expected
    assert_clean(core)
    return core.executor.covered / core.executor.used


@pytest.mark.parametrize("streams", [2, 4])
def test_running_sequences_lie_side_by_side(streams):
    assert spread(streams, ranged=True, cache=True) <= spread(streams, ranged=False, cache=False) + 0.02
    assert spread(streams, ranged=False, cache=True) > 1.1, "negative control"


def test_a_snapshot_that_moved_is_still_found():
    plan = plan_of("slots")
    core = make(plan, [3], sequences=3, ranged=True)
    prompts = [[i + 1] * 20 for i in range(3)]
    results, finished = {}, {}
    for prompt in prompts:
        core.add(prompt, greedy(2))
        drain(core, results, finished)
    for again in (prompts[:2], prompts[1:], prompts):
        ids = [core.add([*prompt, 5, 6], greedy(9)) for prompt in again]
        drain(core, results, finished, assert_sound)
        assert [results[i] for i in ids] == [oracle([*p, 5, 6], 9, plan, VOCAB) for p in again]
    assert_clean(core)
