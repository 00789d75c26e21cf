"""Constrained output through the engine core: every text is in its grammar, whatever else runs."""

import json
import re
import threading
from dataclasses import replace

import numpy as np
import pytest

from llmopt.errors import RequestError
from llmopt.runtime.core import EngineCore
from llmopt.runtime.grammar import Constraints, GrammarCompiler
from llmopt.runtime.params import GenerationParams, Grammar
from llmopt.runtime.protocol import NO_TOKEN, ExecutorLimits, SamplingParams
from llmopt.runtime.tokenizer import Tokenizer
from tests.runtime.fake import FakeExecutor, oracle, plan_of

llguidance = pytest.importorskip("llguidance")

VOCAB, CONTEXT, EOS = 4096, 96, (1,)
PLAN = plan_of("paged", context=CONTEXT)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA_GRAMMAR = Grammar("json_schema", json.dumps(SCHEMA))
DIGITS = Grammar("regex", "[0-9]{3}")


@pytest.fixture(scope="module")
def tokenizer(embedded_model):
    return Tokenizer.load(embedded_model / "tokenizer.json", embedded_model / "tokenizer_config.json")


@pytest.fixture
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB, EOS)


class Reads(FakeExecutor):
    """Reads masks as a device's executor does: when the forward pass is on its way, before ``submit`` returns."""

    overlaps = 0

    def submit(self, batch):
        ticket = super().submit(batch)
        self.overlaps += bool(batch.masks) and len(self.queue) > 1
        self.queue[-1] = ticket, replace(batch, masks={seq_id: batch.masks[seq_id] for seq_id in batch.masks})
        return ticket


def core_of(compiler, *, blocks=120, flight=1, executor=FakeExecutor):
    limits = ExecutorLimits(CONTEXT, 8, 64, {"paged0": blocks}, VOCAB, steps_in_flight=flight)
    return EngineCore(executor(PLAN, limits), EOS, compiler)


def params(grammar=None, **sampling):
    return GenerationParams(SamplingParams(**{"temperature": 1.0, "seed": 3, **sampling}), 60, grammar=grammar)


def run(core, requests):
    """Tokens and finish reason of each request, in order."""
    ids = [core.add(prompt, p) for prompt, p in requests]
    tokens, reasons = {i: [] for i in ids}, {}
    while core.has_work:
        for output in core.step():
            tokens[output.request_id].append(output.sampled.token)
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
    return [(tokens[i], reasons.get(i)) for i in ids]


@pytest.mark.parametrize(("flight", "executor"), [(1, FakeExecutor), (2, FakeExecutor), (2, Reads)])
@pytest.mark.parametrize("blocks", [120, 30])
def test_constrained_and_free_requests_together(compiler, tokenizer, flight, executor, blocks):
    core = core_of(compiler, blocks=blocks, flight=flight, executor=executor)
    grammars = [SCHEMA_GRAMMAR, None, DIGITS, None, SCHEMA_GRAMMAR, DIGITS]
    requests = [([5 + i, 9], params(g, temperature=0 if g is None else 1, seed=i)) for i, g in enumerate(grammars)]
    results = run(core, requests)
    for (prompt, _), grammar, (tokens, reason) in zip(requests, grammars, results):
        if grammar is None:
            assert tokens == oracle(prompt, 60, PLAN, VOCAB)
            continue
        assert reason == "stop"
        text = tokenizer.decode(tokens)
        if grammar is DIGITS:
            assert re.fullmatch("[0-9]{3}", text)
        else:
            found = json.loads(text)
            assert set(found) == {"name", "age"}
            assert isinstance(found["age"], int)
            assert found["age"] <= 120
    assert (core.scheduler.stats().preemptions > 0) == (blocks == 30)
    if blocks == 30:  # preemption changes nothing
        assert results == run(core_of(compiler), requests)


def test_constrained_requests_run_ahead(compiler):
    """The next forward pass is under way before the token is known that its mask follows from."""
    requests = [([5 + i, 9], params([SCHEMA_GRAMMAR, DIGITS][i % 2], seed=i)) for i in range(4)]
    core = core_of(compiler, flight=2, executor=Reads)
    assert run(core, requests) == run(core_of(compiler), requests)
    tickets, overlaps = core.executor.tickets, core.executor.overlaps
    assert overlaps >= 0.8 * tickets
    assert not core.executor.known
    assert not core.has_work


def test_a_grammar_that_is_cut_short_says_length(compiler):
    [(tokens, reason)] = run(core_of(compiler), [([5], GenerationParams(max_tokens=3, grammar=SCHEMA_GRAMMAR))])
    assert (len(tokens), reason) == (3, "length")


def test_eos_ends_a_constrained_text_whatever_ignore_eos_says(compiler, tokenizer):
    asked = GenerationParams(SamplingParams(seed=1), 60, ignore_eos=True, grammar=DIGITS)
    [(tokens, reason)] = run(core_of(compiler), [([5], asked)])
    assert reason == "stop"
    assert tokens[-1] in EOS
    assert len(tokenizer.decode(tokens)) == 3


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "[0-9]("), "invalid regular expression"),
        (Grammar("json_schema", '{"type": "nope"}'), "invalid JSON schema: Invalid type: nope"),
        (Grammar("json_schema", "[1]"), "invalid JSON schema"),
        (Grammar("json_schema", "{"), "invalid JSON schema"),
        (Grammar("lark", 'start: "a" b'), "invalid grammar"),
        (Grammar("regex", "a" * (1 << 21)), "characters"),
        (Grammar("regex", "(" * 3000 + ")" * 3000), "invalid regular expression"),
    ],
    ids=["regex", "type", "list", "json", "lark", "long", "deep"],
)
def test_bad_grammars_are_the_callers_fault(compiler, grammar, message):
    core = core_of(compiler)
    with pytest.raises(RequestError, match=message):
        core.add([5], params(grammar))
    assert not core.has_work


def test_without_an_end_of_sequence_token_there_is_no_constrained_output(tokenizer):
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        GrammarCompiler(tokenizer, VOCAB, ()).compile(DIGITS)


def test_a_token_against_the_grammar_ends_that_request_only(compiler):
    core = core_of(compiler)
    core.constraints.masks = lambda seq_ids: {}  # an executor that ignores masks
    bad, good = core.add([5], params(DIGITS)), core.add([6], params())
    ended = []
    while core.has_work:
        core.step()
        ended += core.failures()
    assert [f.request_id for f in ended] == [bad]
    assert "the grammar cannot go on" in str(ended[0].error)
    assert core.active == 0
    assert good


def forbid_everything(constraints, seq_id):
    """Masks as always, but for one sequence that may draw nothing."""
    plain = constraints.masks

    def masks(seq_ids):
        found = dict(plain(seq_ids))
        return found | {i: np.zeros(constraints.compiler.words, np.uint32) for i in found if i == seq_id}

    constraints.masks = masks


@pytest.mark.parametrize(("flight", "executor"), [(1, FakeExecutor), (2, FakeExecutor), (2, Reads)])
def test_a_request_that_may_draw_nothing_ends_alone(compiler, flight, executor):
    grammars = [SCHEMA_GRAMMAR, DIGITS, None, SCHEMA_GRAMMAR]
    requests = [([5 + i, 9], params(g, seed=i)) for i, g in enumerate(grammars)]
    alone = run(core_of(compiler), requests)
    core = core_of(compiler, flight=flight, executor=executor)
    forbid_everything(core.constraints, 2)
    found, [failure] = run(core, requests), core.failures()
    assert (failure.request_id, found[1]) == (2, ([], None))
    assert "no token is allowed" in str(failure.error)
    assert [found[i] for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]
    assert not core.executor.known
    assert core.active == 0


def test_masks_are_the_matchers(compiler):
    constraints = Constraints(compiler)
    constraints.add(7, DIGITS)
    masks = constraints.masks([7, 8])
    assert list(masks) == [7]
    assert 8 not in masks
    allowed = np.flatnonzero(np.unpackbits(masks[7].view(np.uint8), bitorder="little"))
    texts = [compiler._source.token_bytes(int(i)).decode() for i in allowed]
    assert texts
    assert all(re.fullmatch("[0-9]{1,3}", t) for t in texts)

    with pytest.raises(KeyError):
        masks[8]


@pytest.mark.parametrize("cores", [2, 5])
def test_many_masks_are_those_of_each_alone(compiler, monkeypatch, cores):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    constraints = Constraints(compiler)
    for seq_id in range(40):
        constraints.add(seq_id, DIGITS if seq_id % 3 else SCHEMA_GRAMMAR)
    together = constraints.masks(range(40))
    for seq_id in range(40):
        assert np.array_equal(together[seq_id], constraints.masks([seq_id])[seq_id])
        assert together[seq_id].any()


def test_compiled_grammars_are_kept(compiler):
    assert not compiler.knows(DIGITS)
    first, second = compiler.compile(DIGITS), compiler.compile(DIGITS)
    assert compiler.knows(DIGITS)
    first.consume_tokens(compiler._tokens.tokenize_str("123"))
    assert first.is_stopped()
    assert not second.is_stopped()


HANDED = replace(ExecutorLimits(CONTEXT, 8, 64, {"paged0": 120}, VOCAB), spare_core=True)


def test_a_thread_fills_the_same_masks(compiler):
    """Six sequences, enough for the thread; tokens as without it, and nothing is left running."""
    requests = [([5 + i, 9], params([SCHEMA_GRAMMAR, DIGITS][i % 2], seed=i, temperature=i % 3)) for i in range(6)]
    core = EngineCore(FakeExecutor(PLAN, HANDED), EOS, compiler)
    assert run(core, requests) == run(core_of(compiler), requests)
    assert any(thread.name == "masks" for thread in threading.enumerate())
    core.close()
    core.close()
    for thread in threading.enumerate():
        if thread.name == "masks":
            thread.join(10)
            assert not thread.is_alive()


def test_an_executor_that_ignores_masks_is_found_out_at_its_first_wrong_token(compiler):
    """Also while a thread still fills them: a token that no mask allows is never consumed, nor handed out."""
    core = EngineCore(FakeExecutor(PLAN, HANDED), EOS, compiler)
    submit = core.executor.submit
    core.executor.submit = lambda batch: submit(replace(batch, masks={}))
    ids = [core.add([5 + i], params(DIGITS, seed=i)) for i in range(5)]
    ended, tokens = [], {i: [] for i in ids}
    while core.has_work:
        for output in core.step():
            tokens[output.request_id].append(output.sampled.token)
        ended += core.failures()
    assert sorted(f.request_id for f in ended) == ids
    assert all("the grammar cannot go on after token" in str(f.error) for f in ended)
    for found in tokens.values():
        assert re.fullmatch("[0-9]{0,3}", compiler._source.decode(found))
    core.close()


@pytest.mark.parametrize("cores", [2, 5])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("ahead", [False, True])
def test_masks_follow_the_accepted_tokens(compiler, monkeypatch, cores, count, ahead):
    """Against a matcher that consumes every token at once; a sequence may also miss a step or two."""
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    rng, constraints = np.random.default_rng(count), Constraints(compiler, ahead)
    plain = {seq_id: compiler.compile(SCHEMA_GRAMMAR) for seq_id in range(count)}
    for seq_id in plain:
        constraints.add(seq_id, SCHEMA_GRAMMAR)
    for _ in range(12):
        some = [seq_id for seq_id in plain if count == 1 or rng.random() < 0.8]
        masks, tokens = constraints.masks(some), {}
        for seq_id in some:
            mask = masks[seq_id]
            expected = np.zeros_like(mask)
            plain[seq_id].unsafe_compute_mask_ptr(expected.ctypes.data, expected.nbytes)
            assert np.array_equal(mask, expected)
            tokens[seq_id] = int(rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))))
        assert not constraints.accept(tokens)
        for seq_id, token in tokens.items():
            assert plain[seq_id].consume_token(token)
            if token in EOS:
                constraints.forget(seq_id)
        plain = {seq_id: matcher for seq_id, matcher in plain.items() if tokens.get(seq_id) not in EOS}
    constraints.close()


@pytest.mark.parametrize("cores", [2, 5])
def test_a_grammar_that_fails_between_two_tokens_allows_nothing(compiler, monkeypatch, cores):
    """llguidance then allows the end of the text, which would look finished."""
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    constraints = Constraints(compiler)
    for seq_id in range(20):
        constraints.add(seq_id, DIGITS)
    constraints._states[7].token = 5  # as if a token could not be consumed
    masks = constraints.masks(range(20))
    assert [seq_id for seq_id in range(20) if not masks[seq_id].any()] == [7]
    refused = constraints.accept({7: NO_TOKEN})
    assert "the grammar cannot go on: " in str(refused[7])


def test_masks_that_nobody_read_are_not_those_of_the_next_step(compiler):
    constraints = Constraints(compiler, ahead=True)
    for seq_id in range(10):
        constraints.add(seq_id, SCHEMA_GRAMMAR if seq_id < 5 else DIGITS)
    constraints.masks(range(5))
    later = constraints.masks(range(5, 10))
    assert np.array_equal(later[5], constraints.masks([6])[6])
    assert not constraints.accept(
        {6: int(np.flatnonzero(np.unpackbits(later[6].view(np.uint8), bitorder="little"))[0])}
    )
    constraints.close()


def test_what_goes_wrong_in_the_thread_is_raised_by_the_reader(compiler):
    constraints = Constraints(compiler, ahead=True)
    for seq_id in range(5):
        constraints.add(seq_id, DIGITS)
    constraints._states[3].token = "none"
    with pytest.raises(TypeError):
        constraints.masks(range(5))[3]
    constraints.close()
