"""The text engine over a fake executor: stop strings end what runs, failures leave nothing behind."""

import pytest

from llmopt.errors import ExecutorError, RequestError
from llmopt.runtime.engine import Engine
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import ExecutorLimits, SamplingParams
from llmopt.runtime.tokenizer import Tokenizer
from tests.runtime.fake import FakeExecutor, oracle, plan_of

GREEDY = SamplingParams(temperature=0)
PLAN = plan_of("paged")


@pytest.fixture
def engine(embedded_model):
    """An engine whose vocabulary is the embedded model's."""
    tokenizer = Tokenizer.load(embedded_model / "tokenizer.json", embedded_model / "tokenizer_config.json")
    limits = ExecutorLimits(64, 4, 32, {"paged0": 32}, 4096, steps_in_flight=2)
    return Engine(FakeExecutor(PLAN, limits), tokenizer)


def assert_idle(engine):
    """Nothing runs, and after one last step the executor knows of nothing."""
    while engine.has_work:
        assert engine.step() == []
    assert engine.core.active == 0
    assert not engine._requests
    assert not engine.core.executor.known
    assert not engine.core.scheduler.allocator.owners()


def test_outputs_add_up_to_the_completion(engine):
    prompts = ["Call me", [1, 2, 3]]
    done = engine.generate(prompts, GenerationParams(GREEDY, max_tokens=12))
    for prompt, completion in zip(prompts, done):
        ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = oracle(ids, 12, PLAN, 4096)
        assert completion.tokens == tuple(tokens)
        assert completion.text == engine.tokenizer.decode(tokens)
        assert (completion.prompt_tokens, completion.completion_tokens) == (len(ids), 12)
    assert_idle(engine)


def test_a_stop_string_ends_the_request(engine):
    text = engine.tokenizer.decode(oracle([1, 2, 3], 20, PLAN, 4096))
    stop = text[10:13]
    [done] = engine.generate([[1, 2, 3]], GenerationParams(GREEDY, max_tokens=20, stop=(stop,)))
    assert done.text == text[: text.index(stop)]
    assert done.finish_reason == "stop"
    assert done.completion_tokens < 20
    assert_idle(engine)


def test_cancelling(engine):
    first, second = (engine.add([i, 2], GenerationParams(GREEDY, max_tokens=20)) for i in (1, 2))
    engine.step()
    assert engine.cancel(first)
    assert not engine.cancel(first)
    outputs = [o for _ in range(30) for o in engine.step()]
    assert {o.request_id for o in outputs} == {second}
    assert outputs[-1].finished
    assert not engine.cancel(second)
    assert_idle(engine)


def test_a_refused_prompt_cancels_those_before_it(engine):
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.generate(["Call me", ""], GenerationParams(GREEDY, max_tokens=3))
    assert_idle(engine)


def test_a_dead_executor_reaches_the_caller(engine):
    engine.core.executor.fail_at = 3
    with pytest.raises(ExecutorError, match="the device is gone"):
        engine.generate(["Call me"], GenerationParams(GREEDY, max_tokens=9))
