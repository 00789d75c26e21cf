"""The prefix cache: what it finds against brute force, what it saves, what the layout's bits allow, who goes first."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.program import StatePlan
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.prefix import Match, PrefixCache
from llmopt.runtime.state import StateAllocator
from tests.runtime.fake import FakeExecutor, oracle, plan_of
from tests.runtime.loads import VOCAB, assert_clean, assert_sound, drain, greedy, make, step

PROMPT = list(range(1, 31))


class Recording(FakeExecutor):
    """Keeps the state operations of every step."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ops = []

    def submit(self, batch):
        self.ops += [op.kind for op in batch.ops]
        return super().submit(batch)


class Forgetful(Recording):
    """Negative control: does not copy."""

    def _apply(self, op):
        if op.kind != "copy":
            super()._apply(op)


def answers(core, prompts, count=6):
    """Answers to prompts added at once."""
    ids = [core.add(p, greedy(count)) for p in prompts]
    results = {}
    drain(core, results, {}, assert_sound)
    return [results[i] for i in ids]


def with_bits(plan, **bits):
    """The same plan with other bits in every group."""
    return StatePlan(tuple(replace(g, **bits) for g in plan.groups))


# --- finding ---------------------------------------------------------------------------------------------------

words = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@settings(max_examples=200, deadline=None)
@given(st.lists(words, max_size=8), words, st.sampled_from(["paged", "slots"]))
def test_the_longest_prefix_is_found(kept, wanted, kind):
    """Against brute force: the longest common prefix with anything kept (slots: from a whole chunk on)."""
    plan = plan_of(kind)
    allocator = StateAllocator(plan, {plan.groups[0].name: 200})
    cache = PrefixCache(plan, allocator)
    cache.granule = cache.tree.granule = 4
    for seq_id, tokens in enumerate(kept):
        keep(cache, allocator, seq_id, tokens)
    shared = max((prefix(tokens, wanted[:-1]) for tokens in kept), default=0)
    if kind == "slots" and shared < 4:
        shared = 0
    assert cache.match("", np.array(wanted, np.int64)).tokens == shared


def keep(cache, allocator, seq_id, tokens):
    """A sequence that was computed without the cache, and ended."""
    cache.claim(seq_id, Match(""))
    assert allocator.extend(seq_id, len(tokens))
    cache.enter(seq_id, Match(""), np.array(tokens, np.int64))
    cache.progress(seq_id, len(tokens))
    cache.leave(seq_id, np.array(tokens, np.int64))
    allocator.release(seq_id)


def prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# --- saving ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["paged", "slots"])
def test_choices_of_one_prompt_compute_it_once(kind):
    plan = plan_of(kind)
    core = make(plan, [60] if kind == "paged" else [5], step=64, executor=Recording)
    assert answers(core, [PROMPT] * 4) == [oracle(PROMPT, 6, plan, VOCAB)] * 4
    decoded = 4 * 5
    assert core.executor.rows == len(PROMPT) + 3 * 1 + decoded
    assert core.executor.ops.count("copy") == 3
    assert core.scheduler.stats().cached_tokens == 3 * (len(PROMPT) - 1)
    assert_clean(core)


def test_without_copies_the_choices_would_be_wrong():
    plan = plan_of("paged")
    core = make(plan, [60], step=64, executor=Forgetful)
    first, *others = answers(core, [PROMPT] * 4)
    assert first == oracle(PROMPT, 6, plan, VOCAB)
    assert all(other != first for other in others)


def test_many_requests_over_a_few_long_prompts_wait_for_each_other():
    plan = plan_of("paged")
    core = make(plan, [200], step=32, sequences=8)
    stems = [[i] * 40 for i in range(2)]
    prompts = [stems[i % 2] + [i, i] for i in range(12)]
    assert answers(core, prompts, 3) == [oracle(p, 3, plan, VOCAB) for p in prompts]
    assert core.scheduler.stats().cached_tokens == 10 * 40
    assert_clean(core)


@pytest.mark.parametrize("kinds", [("paged",), ("slots",), ("ring",), ("paged", "ring"), ("paged", "slots", "ring")])
def test_a_conversation_goes_on_where_it_was(kinds):
    plan = plan_of(*kinds)
    core = make(plan, [40 if k == "paged" else 3 for k in kinds])
    text, before = PROMPT[:20], 0
    for turn in range(3):
        [answer] = answers(core, [text])
        assert answer == oracle(text, 6, plan, VOCAB)
        saved = core.scheduler.stats().cached_tokens - before
        # all of the last turn but the token that was drawn last, which was never computed
        assert saved == (0 if turn == 0 else len(text) - 3)
        before += saved
        text = text + answer + [turn, turn]
    assert_clean(core)


def test_salts_do_not_share():
    core = make(plan_of("paged"), [40])
    for salt in ("a", "b", "a"):
        core.add(PROMPT, greedy(1, cache_salt=salt))
        drain(core, {}, {})
    assert core.scheduler.stats().cached_tokens == len(PROMPT) - 1


def test_switched_off_it_keeps_nothing():
    core = make(plan_of("paged"), [40], options=SchedulerOptions(prefix_cache=False))
    assert answers(core, [PROMPT])[0] == answers(core, [PROMPT])[0]
    assert core.scheduler.stats().cached_tokens == 0
    assert core.scheduler.allocator.pools["paged0"].free == 40


def test_what_was_used_longest_ago_goes_first():
    core = make(plan_of("paged"), [30], context=120)
    prompts = [[i] * 31 for i in range(4)]  # 8 blocks each with their answers
    for i in (0, 1, 2, 0, 3):
        answers(core, [prompts[i]], 1)
    before = core.scheduler.stats().cached_tokens
    for i, found in ((0, True), (1, False)):
        answers(core, [prompts[i]], 1)
        after = core.scheduler.stats().cached_tokens
        assert (after - before == 30) == found, i
        before = after


def test_the_cache_never_keeps_a_request_waiting():
    """A prompt that needs every block there is gets them, though its own prefix is what fills the cache."""
    plan = plan_of("paged")
    core = make(plan, [8])
    prompt = [5] * 30
    assert answers(core, [prompt], 2) == answers(core, [prompt], 2) == [oracle(prompt, 2, plan, VOCAB)]
    assert_clean(core)


def test_the_block_of_a_shared_last_chunk_is_counted_once():
    """Two equal prompts that end within a block: the first to end leaves a longer chunk in the same block."""
    plan = plan_of("paged")
    core = make(plan, [24])
    first, second = core.add([1] * 6, greedy(2)), core.add([1] * 6, greedy(20))
    results, finished = {}, {}
    while first not in finished:
        step(core, results, finished)
        assert_sound(core)
    drain(core, results, finished, assert_sound)
    assert results[second][:2] == results[first]
    assert_clean(core)


def test_a_block_given_to_somebody_else_is_not_copied():
    """Of two equal prompts that end within a block, the first ends; another prompt is given its last block, then the
    same prompt comes again while the second one still runs: it may share whole chunks only."""
    plan = plan_of("paged", "slots")
    core = make(plan, [14, 4])
    results, finished = {}, {}
    first, second = core.add([1] * 6, greedy(2)), core.add([1] * 6, greedy(20))
    while first not in finished:
        step(core, results, finished)
    other = core.add([2] * 44, greedy(1))
    while other not in finished:
        step(core, results, finished)
    assert second not in finished
    again = core.add([1] * 6, greedy(2))
    drain(core, results, finished, assert_sound)
    assert results[again] == results[first] == oracle([1] * 6, 2, plan, VOCAB)
    assert_clean(core)


# --- the layout's bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bits", "saved"),
    [
        ("paged", {}, 26),
        ("paged", {"shareable": False}, 0),
        ("paged", {"copyable": False}, 24),
        ("paged", {"truncatable": False}, 24),
        ("slots", {}, 26),
        ("slots", {"copyable": False}, 0),
        ("slots", {"truncatable": False}, 0),
        ("ring", {}, 0),
    ],
)
def test_bits_say_what_a_diverging_prompt_may_reuse(kind, bits, saved):
    plan = with_bits(plan_of(kind), **bits)
    core = make(plan, [40] if kind == "paged" else [4])
    prompts = [PROMPT, [*PROMPT[:26], 90, 91, 92]]
    for prompt in prompts:
        assert answers(core, [prompt]) == [oracle(prompt, 6, plan, VOCAB)]
    assert core.scheduler.stats().cached_tokens == saved
    assert_clean(core)


@pytest.mark.parametrize("kinds", [("paged",), ("slots",)])
def test_what_a_request_is_said_to_have_found_is_what_nobody_computed(kinds):
    core = make(plan_of(*kinds), [200 if kinds == ("paged",) else 6], options=SchedulerOptions())
    prompts = [PROMPT, [*PROMPT[:20], 90, 91], PROMPT, [80] * 9]
    found = []
    for prompt in prompts:
        core.add(prompt, greedy(5))
        outputs = []
        while core.has_work:
            outputs += core.step()
        assert [output.cached is None for output in outputs] == [False, True, True, True, True]
        found.append(outputs[0].cached)
    assert found == [0, 20, 29, 0]
    assert core.executor.rows == sum(map(len, prompts)) - sum(found) + 4 * len(prompts)
