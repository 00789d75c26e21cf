"""Any load, any layout, any options: every request gets what it would get alone, ends once, and nothing leaks."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llmopt.runtime.fairness import QueueOptions
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.params import Grammar
from llmopt.runtime.swap import SwapOptions
from tests.runtime.fake import FakeExecutor, Turns, logits_after, oracle, plan_of
from tests.runtime.loads import VOCAB, assert_clean, assert_sound, drain, greedy, make, step, until

PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
"""Shrinking an engine's run takes minutes; a failing example says enough."""
GRAMMAR = Grammar("regex", "whatever the stand-in makes of it")
KINDS = [("paged",), ("slots",), ("ring",), ("paged", "ring"), ("paged", "slots"), ("paged", "slots", "ring"), ()]
STEMS = [[7] * 40, [7] * 16 + [8] * 24]
"""Prompts begin with a part of one of these, so that prefixes are shared."""

prompts = st.builds(
    lambda stem, cut, rest: (STEMS[stem][:cut] + rest)[:40],
    st.integers(0, len(STEMS) - 1),
    st.sampled_from([40, 33, 20, 17, 16, 3]),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
)
requests_of = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": prompts,
            "count": st.one_of(st.integers(1, 6), st.integers(15, 30)),
            "start": st.one_of(st.integers(0, 3), st.integers(0, 25)),
            "cancel": st.one_of(st.none(), st.none(), st.integers(0, 30)),
            "priority": st.integers(-1, 1),
            "tenant": st.sampled_from("ab"),
            "salt": st.sampled_from(["", "", "", "x"]),
            "timeout": st.one_of(st.none(), st.none(), st.none(), st.floats(1, 40)),
            "repeat": st.sampled_from([1, 1, 2, 4]),
            "scored": st.sampled_from([False, False, False, True]),
            "masked": st.sampled_from([False, False, True]),
        }
    ),
    min_size=2,
    max_size=7,
)
options_of = st.builds(
    lambda chunk, cache, swap, fast, aging: SchedulerOptions(
        chunk=chunk,
        prefix_cache=cache,
        queue=QueueOptions(aging_seconds=aging),
        swap=SwapOptions(bytes=swap, bytes_per_second=1e12 if fast else 1.0),
    ),
    st.sampled_from([None, 1, 3, 8]),
    st.sampled_from([True, True, False]),
    st.sampled_from([0, 0, 100, 1000, 100_000]),
    st.sampled_from([True, True, False]),
    st.sampled_from([1.0, 10.0, 1e9]),
)


any_load = given(
    requests_of, options_of, st.sampled_from(KINDS), st.integers(16, 30), st.integers(1, 24), st.booleans(), st.data()
)


@settings(max_examples=60, deadline=None, phases=PHASES)
@any_load
def test_any_load(requests, options, kinds, blocks, tokens, longrope, data):
    run_load(requests, options, kinds, blocks, tokens, longrope, data)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, phases=PHASES)
@any_load
def test_any_load_at_length(requests, options, kinds, blocks, tokens, longrope, data):
    run_load(requests, options, kinds, blocks, tokens, longrope, data)


def run_load(requests, options, kinds, blocks, tokens, longrope, data):
    """Add, cancel and step for 31 virtual seconds, then drain; compare with each request alone."""
    plan = plan_of(*kinds)
    switch = data.draw(st.integers(1, 50)) if longrope else None
    eos = frozenset(data.draw(st.sets(st.integers(0, VOCAB - 1), max_size=4)))
    counts = [blocks if g.kind == "paged" else data.draw(st.integers(1, 5)) for g in plan.groups]
    depth, ranged = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    more = {"ranged": ranged, "buckets": data.draw(st.sampled_from([(), (4, 16), (24,)]))}
    core = make(plan, counts, step=tokens, depth=depth, switch=switch, eos=eos, options=options, **more)
    core.constraints = Turns(VOCAB)
    results, finished, scores, cancelled, ids = {}, {}, {}, set(), {}
    for now in range(31):
        for i, request in enumerate(requests):
            if request["start"] == now:
                for copy in range(request["repeat"]):
                    more = {name: request[name] for name in ("priority", "tenant", "timeout")}
                    more |= {"cache_salt": request["salt"], "grammar": GRAMMAR if request["masked"] else None}
                    params = greedy(request["count"], prompt_logprobs=1 if request["scored"] else None, **more)
                    ids[core.add(request["prompt"], params)] = (i, copy)
            if request["cancel"] == now:
                for seq_id in [s for s, (which, _) in ids.items() if which == i]:
                    assert core.cancel(seq_id) == (seq_id not in finished.keys() | cancelled)
                    cancelled |= {seq_id} - finished.keys()
        step(core, results, finished, scores)
        core.clock.advance(1.0)
        assert_sound(core)
    drain(core, results, finished, assert_sound, scores)
    assert finished.keys() | cancelled == set(ids), "a request has no end"
    assert not finished.keys() & cancelled
    for seq_id, (which, _) in ids.items():
        request = requests[which]
        count = min(request["count"], core.context - len(request["prompt"]))
        expected = until(oracle(request["prompt"], count, plan, VOCAB, switch, request["masked"]), eos)
        got = results.get(seq_id, [])
        assert got == expected[: len(got)]
        if request["scored"] and got:
            assert_scored(request["prompt"], scores[seq_id])
        if finished.get(seq_id) == "DeadlineError":
            assert request["timeout"] is not None
        elif seq_id in finished:
            assert got == expected
            assert finished[seq_id] == ("stop" if expected[-1] in eos else "length")
    assert not core.constraints.drawn
    assert_clean(core)


def assert_scored(prompt, report):
    """The log-probability of every token of a prompt but the first."""
    assert [entry.token for entry in report] == prompt
    for i, entry in enumerate(report[1:], 1):
        row = logits_after(prompt[:i], VOCAB).astype(np.float64)
        assert entry.logprob == pytest.approx(row[prompt[i]] - np.log(np.exp(row).sum()), abs=1e-5)


@pytest.mark.parametrize(("buckets", "expected"), [((), 5), ((4, 8, 16), 6), ((4,), 5), ((5, 7), 5), ((30,), 12)])
def test_a_chunk_grows_into_the_rows_its_step_is_padded_with(buckets, expected):
    """Two sequences decode when a prompt of 40 tokens comes; a chunk is 5 tokens and a step holds 14."""
    rows = []

    class Watched(FakeExecutor):
        def submit(self, batch):
            rows.append([row.query_len for row in batch.rows])
            return super().submit(batch)

    options = SchedulerOptions(chunk=5, prefix_cache=False)
    core = make(plan_of("paged"), [60], step=14, options=options, buckets=buckets, executor=Watched)
    for _ in range(2):
        core.add([1, 2, 3], greedy(30))
    core.step()
    core.add(list(range(9)) * 4 + [1] * 4, greedy(1))
    core.step()
    core.step()
    assert rows[-1] == [expected]


def test_the_wait_in_the_queue_is_known_with_the_first_token():
    """One sequence at a time, a second a step: the wait ends with the first step."""
    core = make(plan_of("paged"), [8], sequences=1)
    for _ in range(3):
        core.add([1, 2, 3], greedy(2))
    waited = {}
    while core.has_work:
        for output in core.step():
            if output.cached is not None:
                waited[output.request_id] = output.waited
        core.clock.advance(1.0)
    assert waited == {1: 0.0, 2: 2.0, 3: 4.0}
