"""On real executors in fp32: a request says the same alone, in a batch of 32, preempted, swapped, from the cache."""

from __future__ import annotations

import numpy as np
import pytest

from llmopt.artifact import Artifact
from llmopt.runtime.core import EngineCore
from llmopt.runtime.executors import load_executor
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import SamplingParams
from llmopt.runtime.session import load_tokenizer
from llmopt.runtime.swap import SwapOptions
from llmopt.target import LoadOptions

pytestmark = pytest.mark.slow

# What the tests of an executor share is computed once, by one worker.
RECIPES = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"same tokens of {name}"))
    for name in ("fp32-reference", "fp32-cpu")
]
SEQUENCES = 40
STEMS = ["It was the best of times, it was the worst of times, it was the age of ", "Call me Ishmael. Some years ago",
         "The old house stood on the hill, and nobody had lived in it since "]  # fmt: skip
NEW = 12
WITHOUT_CACHE = SchedulerOptions(prefix_cache=False)
SWAPPING = SchedulerOptions(prefix_cache=False, swap=SwapOptions(bytes=1 << 30, bytes_per_second=1e12))


@pytest.fixture(scope="module", params=RECIPES)
def executor(request, compiled):
    """One executor of each kind, with 40 sequences; every test leaves it empty."""
    loaded = load_executor(
        Artifact.open(compiled(request.param)), LoadOptions(max_sequences=SEQUENCES, max_context=128, threads=1)
    )
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def prompts(embedded_model, compiled):
    """32 prompts of 10 to 80 tokens; many share a beginning."""
    tokenizer = load_tokenizer(Artifact.open(compiled("fp32-cpu")))
    rng = np.random.default_rng(0)
    found = []
    for i in range(32):
        ids = tokenizer.encode(STEMS[i % 3])
        found.append([*ids, *rng.integers(10, 400, i % 7).tolist()] if i % 4 else ids[: 8 + i // 4])
    return found


@pytest.fixture(scope="module")
def alone(executor, prompts):
    """What each prompt gives by itself, without a cache."""
    return [run(EngineCore(executor, options=WITHOUT_CACHE), [prompt])[0] for prompt in prompts]


def run(core, prompts):
    """Greedy tokens of prompts that are added together."""
    params = GenerationParams(SamplingParams(temperature=0), NEW, ignore_eos=True)
    ids = [core.add(prompt, params) for prompt in prompts]
    results = {i: [] for i in ids}
    while core.has_work:
        for output in core.step():
            results[output.request_id].append(output.sampled.token)
    return [results[i] for i in ids]


def paged(executor):
    return executor.state_plan.groups[0].kind == "paged"


def test_in_a_batch_of_32(executor, prompts, alone):
    assert run(EngineCore(executor, options=WITHOUT_CACHE), prompts) == alone


def test_in_small_chunks(executor, prompts, alone):
    options = SchedulerOptions(prefix_cache=False, chunk=5, step_tokens=40)
    assert run(EngineCore(executor, options=options), prompts) == alone


@pytest.mark.parametrize("options", [WITHOUT_CACHE, SWAPPING], ids=["recomputed", "swapped"])
def test_preempted(executor, prompts, alone, options):
    """Every third step a sequence loses its place."""
    core = EngineCore(executor, options=options)
    assert interrupted(core, prompts) == alone
    stats = core.scheduler.stats()
    assert (stats.swaps if options is SWAPPING else stats.recomputes) > 3


def interrupted(core, prompts):
    """Tokens of prompts whose sequences give up their places now and then."""
    params = GenerationParams(SamplingParams(temperature=0), NEW, ignore_eos=True)
    ids = [core.add(prompt, params) for prompt in prompts]
    results = {i: [] for i in ids}
    for step in range(10_000):
        if not core.has_work:
            return [results[i] for i in ids]
        for output in core.step():
            results[output.request_id].append(output.sampled.token)
        if step % 3 == 2 and core.scheduler.running:
            core.scheduler._preempt(core.scheduler._victim())
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("together", [True, False])
def test_with_prefix_cache_hits(executor, prompts, alone, together):
    core = EngineCore(executor)
    if together:
        found = run(core, prompts)
    else:
        params = GenerationParams(SamplingParams(temperature=0), NEW, ignore_eos=True)
        found = []
        prompts, alone = prompts[:12], alone[:12]
        for prompt in prompts:
            core.add(prompt, params)
            found.append([])
            while core.has_work:
                found[-1] += [output.sampled.token for output in core.step()]
    assert core.scheduler.stats().cached_tokens > sum(map(len, prompts)) / 3
    assert found == alone


def test_with_everything_at_once(executor, prompts, alone):
    """Hits, chunks, swaps and a crowd, twice over."""
    options = SchedulerOptions(chunk=16, swap=SwapOptions(bytes=1 << 30, bytes_per_second=1e12))
    core = EngineCore(executor, options=options)
    for _ in range(2):
        assert interrupted(core, prompts) == alone
    assert core.scheduler.stats().swaps > 3
    assert core.scheduler.stats().cached_tokens > 0


def test_a_wrong_copy_is_noticed(executor, prompts, alone, monkeypatch):
    """Negative control: an executor that does not copy gives other tokens."""
    if paged(executor):
        monkeypatch.setattr(executor, "_state_op", lambda op: None)
    else:
        monkeypatch.setattr(executor.states, "apply", lambda op: None)
        for array in executor.states.memory.arrays.values():
            array.fill(0.5)  # else the slots hold the same prompts from the tests before
    assert run(EngineCore(executor), prompts) != alone
