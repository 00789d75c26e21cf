"""Sessions over compiled artifacts: text equals transformers' generate, alone and batched."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from llmopt.errors import ArtifactError, ResourceError, TargetError
from llmopt.runtime.executors import load_executor
from llmopt.runtime.params import GenerationParams, Grammar
from llmopt.runtime.protocol import SamplingParams
from llmopt.runtime.session import open_session
from llmopt.target import LoadOptions

PROMPTS = ["It was the best of times", "Call me", "The whale\n\n", "In the beginning God created the heaven and"]
GREEDY = GenerationParams(SamplingParams(temperature=0), max_tokens=24)


@pytest.fixture(scope="module")
def expected(embedded_model):
    """Greedy tokens of transformers, prompt by prompt, in fp32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    tokens = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=24, temperature=None, top_p=None)
        tokens.append(tuple(out[0, ids["input_ids"].shape[1] :].tolist()))
    return tokens


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("recipe", ["fp32-reference", "fp32-cpu"])
def test_greedy_tokens_equal_transformers(compiled, expected, recipe, sequences):
    with open_session(compiled(recipe), LoadOptions(max_sequences=sequences, threads=1)) as session:
        done = session.engine.generate(PROMPTS, GREEDY)
        assert [c.tokens for c in done] == expected
        assert [c.text for c in done] == [session.tokenizer.decode(t) for t in expected]
        assert {c.finish_reason for c in done} == {"length"}


def test_preemption_on_a_real_executor(compiled, expected):
    """A pool that holds less than the sequences need: some are computed twice, and say the same."""
    with open_session(compiled("fp32-reference"), LoadOptions(max_sequences=4)) as session:
        core = session.engine.core
        pool = next(iter(core.scheduler.allocator.pools.values()))
        held = pool.take(pool.free - 5)
        done = session.engine.generate(PROMPTS, GREEDY)
        assert core.scheduler.stats().recomputes > 0
        assert [c.tokens for c in done] == expected
        core.scheduler.cache.clear()
        assert pool.free == 5
        pool.give(held)


@pytest.mark.parametrize("recipe", ["fp32-reference", "fp32-cpu"])
def test_a_sequence_that_may_draw_nothing_ends_alone(compiled, expected, recipe):
    """A mask without a token, of one sequence of four, in its third step."""
    pytest.importorskip("llguidance")
    with open_session(compiled(recipe), LoadOptions(max_sequences=4, threads=1)) as session:
        core, text = session.engine.core, session.tokenizer.encode(PROMPTS[0])
        masks, reads = core.constraints.masks, []

        def forbid(seq_ids):
            found = dict(masks(seq_ids))
            reads.extend(found)
            return {i: np.zeros_like(mask) if len(reads) == 3 else mask for i, mask in found.items()}

        core.constraints.masks = forbid
        doomed = core.add(text, dataclasses.replace(GREEDY, grammar=Grammar("regex", "[a-z ]{20,30}")))
        others = {core.add(session.tokenizer.encode(p), GREEDY): list(e) for p, e in zip(PROMPTS[1:], expected[1:])}
        tokens = {i: [] for i in (doomed, *others)}
        while core.has_work:
            for output in core.step():
                tokens[output.request_id].append(output.sampled.token)
        [failure] = core.failures()
        assert (failure.request_id, len(tokens.pop(doomed))) == (doomed, 2)
        assert "no token is allowed" in str(failure.error)
        assert tokens == others


def test_the_chat_template_and_the_tokenizer_come_with_the_artifact(compiled):
    with open_session(compiled("fp32-cpu"), LoadOptions(max_sequences=1)) as session:
        assert session.chat.render([{"role": "user", "content": "Hi"}]) == "<|user|>Hi\n<|assistant|>"
        assert session.tokenizer.decode(session.tokenizer.encode("Hi")) == "Hi"


def test_log_probabilities_are_the_models(compiled, embedded_model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = GenerationParams(SamplingParams(temperature=0, logprobs=3), max_tokens=6)
    with open_session(compiled("fp32-cpu"), LoadOptions(max_sequences=1)) as session:
        ids = session.tokenizer.encode(PROMPTS[0])
        request, sampled = session.engine.add(ids, params), []
        while session.engine.has_work:
            sampled += [t for o in session.engine.step() if o.request_id == request for t in o.delta.tokens]
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids + [t.token for t in sampled]])).logits[0, len(ids) - 1 : -1].double()
    exact = logits.log_softmax(-1).numpy()
    for row, token in zip(exact, sampled, strict=True):
        assert token.logprob == pytest.approx(row[token.token], abs=2e-4)
        assert [i for i, _ in token.top] == np.argsort(-row)[:3].tolist()


def test_no_artifact_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="no such artifact"):
        open_session(tmp_path / "nothing", LoadOptions())


def test_an_unknown_target_is_a_target_error(compiled):
    with open_session(compiled("fp32-cpu"), LoadOptions(max_sequences=1)) as session:
        for name in ("onnxruntim", "../escape", "onnxruntime_calls"):
            manifest = dataclasses.replace(session.artifact.manifest, target=name)
            with pytest.raises(TargetError, match="unknown target"):
                load_executor(dataclasses.replace(session.artifact, manifest=manifest), LoadOptions())


def test_a_missing_library_is_a_resource_error(compiled, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("llmopt.runtime.executors.onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ResourceError, match=r"needs onnxruntime, which is not installed \(pip install"):
        open_session(compiled("fp32-cpu"), LoadOptions())


NO_TORCH = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "triton", "onnx"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Block())
from llmopt.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize(("recipe", "code"), [("fp32-cpu", 0), ("fp32-reference", 70)])
def test_generating_needs_no_torch(compiled, recipe, code):
    """The reference executor, which lives with its target and needs torch, is the negative control."""
    command = [sys.executable, "-c", NO_TORCH, "run", str(compiled(recipe)), "-p", "Call me", "--max-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (code == 0), done.stderr
    assert bool(done.stdout.strip()) == (code == 0)
