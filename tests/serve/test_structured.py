"""Twenty schemas through the engine: every text that is not cut short follows its schema; deterministic mode."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import pytest

from llmopt.runtime.core import EngineCore
from llmopt.runtime.params import GenerationParams, Grammar
from llmopt.runtime.protocol import ExecutorLimits, SamplingParams
from llmopt.runtime.session import open_session
from llmopt.serve.config import load_options, scheduler_options
from llmopt.serve.schemas import schema_source
from llmopt.serve.settings import Settings
from llmopt.target import LoadOptions
from tests.runtime.fake import FakeExecutor, plan_of
from tests.serve.conftest import running
from tests.serve.schemas20 import SCHEMAS

EACH = 5
"""Texts a schema; 50 were tried by hand."""


@pytest.fixture(scope="module")
def artifact(compiled):
    """The embedded model for onnxruntime, context 512."""
    return compiled(512)


@pytest.mark.slow
def test_every_finished_text_follows_its_schema(artifact):
    with open_session(artifact, LoadOptions(threads=1, max_sequences=16)) as session:
        core, asked = session.engine.core, {}
        for number in range(EACH * len(SCHEMAS)):
            schema = SCHEMAS[number % len(SCHEMAS)]
            sampling = SamplingParams(temperature=1.0, seed=number)
            params = GenerationParams(sampling, 400, grammar=Grammar("json_schema", schema_source(schema)))
            asked[core.add([5, 6, 7 + number], params)] = schema
        tokens, reasons = {i: [] for i in asked}, {}
        while core.has_work:
            for output in core.step():
                tokens[output.request_id].append(output.sampled.token)
                if output.finish_reason:
                    reasons[output.request_id] = output.finish_reason
            assert core.failures() == []
        finished = [i for i in asked if reasons[i] == "stop"]
        assert len(finished) >= 0.95 * len(asked)
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        for i in finished:
            found = json.loads(session.tokenizer.decode(tokens[i]))
            jsonschema.validate(found, asked[i], jsonschema.Draft202012Validator, format_checker=checker)
        with pytest.raises(jsonschema.ValidationError):  # the schemas do say no
            jsonschema.validate({"n": "5"}, SCHEMAS[1])


def send(server, body):
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]


def scores(server, count):
    """Log-probabilities of a greedy text while ``count`` others run."""
    body = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "logprobs": 0}
    others = [{**body, "prompt": f"{i} Other words", "max_tokens": 30 + i, "logprobs": None} for i in range(count)]
    with ThreadPoolExecutor(count + 1) as pool:
        waiting = [pool.submit(send, server, other) for other in others]
        found = send(server, body)
        for other in waiting:
            other.result()
    return found["text"], found["logprobs"]["token_logprobs"]


@pytest.mark.slow
def test_deterministic_mode_gives_the_same_bits_whatever_else_runs(artifact, root):
    command = [
        sys.executable,
        "-m",
        "llmopt.cli.main",
        "serve",
        str(artifact),
        "--port",
        "0",
        "--threads",
        "1",
        "--log",
        "off",
    ]
    with running([*command, "--deterministic"], root) as server:
        alone = scores(server, 0)
        assert [scores(server, count) for count in (0, 3, 7)] == [alone] * 3


class Rounding(FakeExecutor):
    """A device whose results depend on the number of rows beside: what bf16 kernels of several shapes do to ties."""

    def _run(self, batch):
        self.beside = len(batch.all_rows(self.state_plan))
        return super()._run(batch)

    def _forward(self, row):
        return (super()._forward(row) + self.beside) % self.limits.vocab_size


def texts(settings, others):
    """Tokens of one request while ``others`` run too."""
    plan = plan_of("paged", context=96)
    limits = ExecutorLimits(96, load_options(settings).max_sequences, 64, {"paged0": 200}, 500)
    core = EngineCore(Rounding(plan, limits), options=scheduler_options(settings))
    greedy = GenerationParams(SamplingParams(temperature=0), 20)
    wanted = core.add([1, 2, 3, 4], greedy)
    for i in range(others):
        core.add([1, 2, 3, 4, i], greedy)
    found = []
    while core.has_work:
        found += [output.sampled.token for output in core.step() if output.request_id == wanted]
    return found


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_mode_on_a_device_that_rounds_by_batch(deterministic):
    settings = Settings(deterministic=deterministic)
    same = [texts(settings, others) == texts(settings, 0) for others in (1, 5, 12)]
    assert same == [deterministic] * 3
