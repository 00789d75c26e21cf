"""Prompt log-probabilities: those of a full forward pass, in bounded chunks, preempted or not."""

import numpy as np
import pytest

from llmopt.runtime.core import EngineCore
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import ExecutorLimits, SamplingParams
from llmopt.runtime.scheduler import SCORED_CHUNK
from tests.runtime.fake import FakeExecutor, logits_after, plan_of

VOCAB, CONTEXT = 50, 256
PLAN = plan_of("paged", context=CONTEXT)


class Watched(FakeExecutor):
    """Keeps how many rows gave their logits at once."""

    def __init__(self, *args):
        super().__init__(*args)
        self.chunks = []

    def _run(self, batch):
        self.chunks += [row.query_len for row in batch.rows if row.logits == "all"]
        return super()._run(batch)


@pytest.mark.parametrize(("blocks", "flight"), [(200, 1), (200, 2), (52, 1)])
def test_prompt_log_probabilities(blocks, flight):
    limits = ExecutorLimits(CONTEXT, 4, 128, {"paged0": blocks}, VOCAB, steps_in_flight=flight)
    executor = Watched(PLAN, limits)
    core = EngineCore(executor)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (150, 3, 1)]
    greedy = SamplingParams(temperature=0)
    ids = [core.add(p, GenerationParams(greedy, 40, prompt_logprobs=2)) for p in prompts]
    plain = core.add([1, 2, 3], GenerationParams(greedy, 40))
    reports = {}
    while core.has_work:
        for output in core.step():
            if output.prompt:
                assert output.request_id not in reports
                reports[output.request_id] = output.prompt
    assert plain not in reports
    assert max(executor.chunks) == SCORED_CHUNK
    for request, prompt in zip(ids, prompts):
        report = reports[request]
        assert [s.token for s in report] == prompt
        assert report[0].logprob is None
        for i in range(1, len(prompt)):
            row = logits_after(prompt[:i], VOCAB).astype(np.float64)
            logprobs = row - np.log(np.exp(row).sum())
            assert report[i].logprob == pytest.approx(logprobs[prompt[i]], abs=1e-5)
            assert [t for t, _ in report[i].top] == np.argsort(-logprobs)[:2].tolist()
