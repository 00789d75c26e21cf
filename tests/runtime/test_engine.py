"""The engine over a fake executor: every request gets what it would get alone, ends once, and nothing leaks."""

import numpy as np
import pytest

from llmopt.errors import ExecutorError, RequestError
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import SamplingParams
from tests.runtime.fake import FakeExecutor, next_token, oracle, plan_of
from tests.runtime.loads import GREEDY, VOCAB, assert_clean, drain, make, until


@pytest.mark.parametrize("depth", [1, 2])
def test_small_pool_preempts_and_still_agrees(depth):
    plan = plan_of("paged")
    core = make(plan, [16], depth=depth)
    prompts = [[i + 1] * 9 for i in range(4)]
    ids = [core.add(p, GenerationParams(GREEDY, max_tokens=40)) for p in prompts]
    results, finished = {i: [] for i in ids}, {}
    drain(core, results, finished)
    assert core.scheduler.stats().recomputes > 0
    assert [results[i] for i in ids] == [oracle(p, 40, plan, VOCAB) for p in prompts]
    assert_clean(core)


def test_seeded_draws_survive_preemption():
    class Flat(FakeExecutor):
        """Logits that leave the choice to chance."""

        def _forward(self, row):
            super()._forward(row)
            return 0

    plan, sampling = plan_of("paged"), SamplingParams(temperature=20.0, seed=5)
    texts = []
    for blocks in (16, 64):
        core = make(plan, [blocks], executor=Flat)
        ids = [core.add([i + 1] * 9, GenerationParams(sampling, max_tokens=40)) for i in range(4)]
        results = {i: [] for i in ids}
        drain(core, results, {})
        texts.append([results[i] for i in ids])
        assert (core.scheduler.stats().recomputes > 0) == (blocks == 16)
    assert texts[0] == texts[1]
    assert len(set(texts[0][0])) > 10


def test_the_oracle_notices_one_wrong_block():
    """Negative control: an executor that reads one foreign block must not agree."""

    class Wrong(FakeExecutor):
        def _forward(self, row):
            blocks = {name: b.copy() for name, b in row.blocks.items()}
            if row.start == 12:
                blocks["paged0"][0] = (blocks["paged0"][0] + 1) % self.limits.blocks["paged0"]
            return super()._forward(type(row)(**{**row.__dict__, "blocks": blocks}))

    plan = plan_of("paged")
    core = make(plan, [16], executor=Wrong)
    i = core.add([5] * 9, GenerationParams(GREEDY, max_tokens=10))
    results = {i: []}
    drain(core, results, {})
    assert results[i] != oracle([5] * 9, 10, plan, VOCAB)


def test_crossing_the_rope_switch_recomputes_once():
    plan, switch = plan_of("paged"), 12
    core = make(plan, [16], switch=switch)
    i = core.add([3] * 10, GenerationParams(GREEDY, max_tokens=8))
    results = {i: []}
    drain(core, results, {})
    assert results[i] == oracle([3] * 10, 8, plan, VOCAB, switch)
    assert core.executor.rows == 10 + 2 + 13 + 4  # prompt, two short rows, all again with the long table, the rest


def test_decode_goes_on_while_a_long_prompt_is_read():
    plan = plan_of("paged")
    core = make(plan, [32], step=4)
    short = core.add([1], GenerationParams(GREEDY, max_tokens=12))
    core.step()
    long = core.add([2] * 30, GenerationParams(GREEDY, max_tokens=2))
    order = [output.request_id for _ in range(9) for output in core.step()]
    assert order == [short] * 9
    assert long in [o.request_id for _ in range(3) for o in core.step()]


def test_first_come_first_served():
    plan = plan_of("paged")
    core = make(plan, [16], sequences=1)
    ids = [core.add([i] * 3, GenerationParams(GREEDY, max_tokens=4)) for i in range(5)]
    ends = {}
    drain(core, {i: [] for i in ids}, ends)
    assert list(ends) == ids


def test_an_overrun_row_is_discarded():
    plan = plan_of("paged")
    eos = next_token([1, 2, 3], plan, VOCAB)
    core = make(plan, [16], depth=2, eos=[eos])
    i = core.add([1, 2, 3], GenerationParams(GREEDY, max_tokens=9))
    results, finished = {i: []}, {}
    drain(core, results, finished)
    assert results[i] == [eos]
    assert core.executor.rows == 4
    assert_clean(core)


def test_ignore_eos_and_stop_token_ids():
    plan = plan_of("slots")
    tokens = oracle([1, 2], 10, plan, VOCAB)
    eos, stop = tokens[1], tokens[4]
    core = make(plan, [2], sequences=2, eos=[eos])
    i = core.add([1, 2], GenerationParams(GREEDY, 10, stop_token_ids=(stop,), ignore_eos=True))
    results, finished = {i: []}, {}
    drain(core, results, finished)
    assert results[i] == until(tokens, {stop})
    assert finished == {i: "stop"}


def test_max_tokens_is_cut_to_the_context():
    plan = plan_of("slots")
    core = make(plan, [2], sequences=2)
    i = core.add([1] * 60, GenerationParams(GREEDY, max_tokens=1000))
    results, finished = {i: []}, {}
    drain(core, results, finished)
    assert (len(results[i]), finished[i]) == (4, "length")


def test_a_pool_smaller_than_the_context_limits_the_context():
    core = make(plan_of("paged"), [5])
    assert core.context == 20
    with pytest.raises(RequestError, match="has 20 tokens and the context is 20"):
        core.add([1] * 20, GenerationParams())


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, "the prompt has 64 tokens and the context is 64"),
        ([VOCAB], {}, r"prompt token 97 is not in \[0, 97\)"),
        ([-1], {}, "prompt token -1"),
        ([1], {"max_tokens": 0}, "max_tokens must be at least 1"),
        ([1], {"stop": ("",)}, "a stop string is empty"),
        ([1], {"stop": ("x",) * 17}, "number of stop strings must be at most 16"),
        ([1], {"stop_token_ids": (97,)}, "stop_token_ids token"),
        ([1], {"sampling": SamplingParams(temperature=-1)}, "temperature must be at least 0"),
        ([1], {"sampling": SamplingParams(temperature=float("nan"))}, "temperature"),
        ([1], {"sampling": SamplingParams(temperature=float("inf"))}, "temperature"),
        ([1], {"sampling": SamplingParams(top_k=-1)}, "top_k"),
        ([1], {"sampling": SamplingParams(top_p=0)}, "top_p"),
        ([1], {"sampling": SamplingParams(min_p=1.5)}, "min_p"),
        ([1], {"sampling": SamplingParams(repetition_penalty=0)}, "repetition_penalty"),
        ([1], {"sampling": SamplingParams(presence_penalty=3)}, "presence_penalty"),
        ([1], {"sampling": SamplingParams(frequency_penalty=-3)}, "frequency_penalty"),
        ([1], {"sampling": SamplingParams(logit_bias={97: 1.0})}, "logit_bias token"),
        ([1], {"sampling": SamplingParams(logit_bias={1: 101.0})}, "logit_bias of token 1"),
        ([1], {"sampling": SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))}, "number of logit_bias tokens"),
        ([1], {"sampling": SamplingParams(logprobs=21)}, "logprobs"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(prompt, params, message):
    core = make(plan_of("paged"), [16])
    with pytest.raises(RequestError, match=message):
        core.add(prompt, GenerationParams(**params))
    assert not core.has_work


def test_a_dead_executor_raises():
    def dead(plan, limits):
        return FakeExecutor(plan, limits, fail_at=2)

    core = make(plan_of("paged"), [16], executor=dead)
    core.add([1], GenerationParams(GREEDY, max_tokens=5))
    core.step()
    with pytest.raises(ExecutorError, match="the device is gone"):
        core.step()


def test_token_arrays_are_accepted_as_prompts():
    core = make(plan_of("paged"), [16])
    i = core.add(np.array([1, 2, 3]), GenerationParams(GREEDY, max_tokens=2))
    results = {i: []}
    drain(core, results, {})
    assert results[i] == oracle([1, 2, 3], 2, plan_of("paged"), VOCAB)
