"""The host sampler against a brute-force fp64 oracle, its distributions, ties, penalties, batches."""

import math
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import ExecutorError
from llmopt.runtime.philox import uniforms
from llmopt.runtime.protocol import NO_TOKEN, Admission, SamplingParams
from llmopt.runtime.sampler import HostSampler, top_ids

VOCAB = 24


def oracle_edit(logits, prompt, output, params, mask):
    """Penalties, bias and mask, one token at a time, in fp64; None is forbidden."""
    edited = []
    for token, x in enumerate(logits):
        if token in prompt or token in output:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        if token in output:
            x -= params.frequency_penalty * output.count(token) + params.presence_penalty
        x += params.logit_bias.get(token, 0.0)
        edited.append(x if mask is None or mask[token] else None)
    return edited


def oracle_probabilities(edited, params):
    """Probability of each token after temperature, top-k, top-p and min-p."""
    ids = [i for i, x in enumerate(edited) if x is not None]
    ranked = sorted(ids, key=lambda i: (-edited[i], i))
    if params.temperature == 0:
        return {ranked[0]: 1.0}
    ranked = ranked[: params.top_k or len(ranked)]
    weights = {i: math.exp((edited[i] - edited[ranked[0]]) / params.temperature) for i in ranked}
    total, kept, mass = math.fsum(weights.values()), [], 0.0
    for i in ranked:
        if kept and mass >= params.top_p * total and params.top_p < 1:
            break
        kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= params.min_p]
    total = math.fsum(weights[i] for i in kept)
    return {i: weights[i] / total for i in sorted(kept)}


def oracle_draw(probabilities, uniform):
    """Inverse of the cumulative distribution in order of token id."""
    for token, reached in zip(probabilities, accumulate(probabilities.values())):
        if uniform < reached:
            return token
    return max(probabilities)


QUARTERS = st.integers(-24, 24).map(lambda n: n / 4)  # many ties, exact in fp32
UNEVEN = st.integers(1, 996).map(lambda n: n / 997)  # no sum of weights lands on it
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.25, 1.0, 2.0]),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.one_of(st.just(1.0), UNEVEN),
    min_p=st.one_of(st.just(0.0), UNEVEN),
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0]),
    presence_penalty=QUARTERS.filter(lambda x: abs(x) <= 2),
    frequency_penalty=QUARTERS.filter(lambda x: abs(x) <= 2),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), QUARTERS, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.one_of(st.none(), st.integers(0, 20)),
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)


def pack(allowed):
    """A boolean per token as the protocol's bitmask."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, bool)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(QUARTERS, min_size=VOCAB, max_size=VOCAB),
    PARAMS,
    TOKENS,
    st.one_of(st.just([]), TOKENS),
    st.one_of(st.none(), st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB).filter(any)),
)
def test_every_draw_equals_the_oracle(logits, params, prompt, output, mask):
    sampler = HostSampler(VOCAB)
    sampler.admit(Admission(1, np.array(prompt), params, np.array(output, np.int64)))
    masks = None if mask is None else {1: pack(mask)}
    drawn = sampler.sample_rows([1], np.array([logits], np.float32), masks)[0]
    probabilities = oracle_probabilities(oracle_edit(logits, prompt, output, params, mask), params)
    uniform = uniforms([params.seed], [len(prompt) + len(output)])[0]
    assert drawn.token == oracle_draw(probabilities, uniform)
    assert sampler.last(1) == drawn.token
    check_logprobs(drawn, logits, params.logprobs)


def check_logprobs(drawn, logits, wanted):
    """Log-softmax of the logits as they came; alternatives by value, then id."""
    if wanted is None:
        assert drawn.logprob is None
        assert drawn.top == ()
        return
    norm = math.log(math.fsum(math.exp(x) for x in logits))
    assert drawn.logprob == pytest.approx(logits[drawn.token] - norm, abs=1e-6)
    best = sorted(range(VOCAB), key=lambda i: (-logits[i], i))[:wanted]
    assert [i for i, _ in drawn.top] == best
    assert [p for _, p in drawn.top] == pytest.approx([logits[i] - norm for i in best], abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(PARAMS, TOKENS), min_size=1, max_size=5), st.data())
def test_a_row_does_not_depend_on_its_batch(rows, data):
    """Three steps of all rows together equal the same steps of each row alone; the order of the rows is free."""
    steps = [np.random.default_rng(i).normal(size=(len(rows), VOCAB)).astype(np.float32) for i in range(3)]
    together, alone = HostSampler(VOCAB), [HostSampler(VOCAB) for _ in rows]
    for i, (params, prompt) in enumerate(rows):
        for sampler in (together, alone[i]):
            sampler.admit(Admission(i, np.array(prompt), params))
    for logits in steps:
        order = data.draw(st.permutations(range(len(rows))))
        drawn = dict(zip(order, together.sample_rows(order, logits[list(order)])))
        for i, sampler in enumerate(alone):
            assert sampler.sample_rows([i], logits[i : i + 1])[0] == drawn[i]


def test_resuming_equals_going_on():
    """After preemption the output so far comes back with the admission: penalties and draws continue."""
    params = SamplingParams(seed=9, frequency_penalty=1.0, repetition_penalty=1.5, temperature=1.5)
    logits = np.random.default_rng(0).normal(size=(8, 1, VOCAB)).astype(np.float32)
    whole, prompt = HostSampler(VOCAB), np.array([1, 2])
    whole.admit(Admission(1, prompt, params))
    tokens = [whole.sample_rows([1], x)[0].token for x in logits]
    resumed = HostSampler(VOCAB)
    resumed.admit(Admission(1, prompt, params, np.array(tokens[:5])))
    assert resumed.last(1) == tokens[4]
    assert [resumed.sample_rows([1], x)[0].token for x in logits[5:]] == tokens[5:]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    """Chi-square over 20,000 draws of one row: fixed seeds, limit at one in a hundred thousand."""
    draws, logits = 20_000, np.random.default_rng(3).normal(size=VOCAB).astype(np.float32) * np.float32(0.6)
    sampler = HostSampler(VOCAB)
    sampler.admit(Admission(1, np.array([0]), SamplingParams(seed=11, **params)))
    counts = Counter(sampler.sample_rows([1], logits[None])[0].token for _ in range(draws))
    expected = oracle_probabilities([float(x) for x in logits], SamplingParams(**params))
    assert set(counts) <= set(expected)
    chi2 = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items())
    assert chi2 < chi_square_limit(len(expected) - 1)
    wrong = {t: 1 / len(expected) for t in expected}  # negative control: the uniform distribution must not pass
    assert sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in wrong.items()) > chi_square_limit(VOCAB)


def chi_square_limit(freedom):
    """Quantile 1 - 1e-5 by Wilson and Hilferty's approximation."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


def test_unseeded_rows_differ():
    sampler, flat = HostSampler(1000), np.zeros((2, 1000), np.float32)
    for i in range(2):
        sampler.admit(Admission(i, np.array([0]), SamplingParams()))
    runs = [[s.token for s in sampler.sample_rows([0, 1], flat)] for _ in range(8)]
    assert [a for a, _ in runs] != [b for _, b in runs]


@given(st.lists(QUARTERS, min_size=1, max_size=40), st.data())
def test_top_ids_prefer_low_ids_among_equals(values, data):
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    assert top_ids(np.array(values, np.float32), k).tolist() == expected


def test_greedy_ties_go_to_the_lowest_id():
    sampler = HostSampler(4)
    sampler.admit(Admission(1, np.array([0]), SamplingParams(temperature=0)))
    assert sampler.sample_rows([1], np.array([[0, 2, 1, 2]], np.float32))[0].token == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_kill_the_engine(bad):
    sampler = HostSampler(4)
    sampler.admit(Admission(1, np.array([0]), SamplingParams(temperature=0)))
    row = np.full((1, 4), bad if bad < 0 else 0, np.float32)
    row[0, 2] = bad
    with pytest.raises(ExecutorError, match="not finite"):
        sampler.sample_rows([1], row)


def test_forbidden_tokens_may_be_minus_infinity():
    sampler = HostSampler(4)
    sampler.admit(Admission(1, np.array([0]), SamplingParams(temperature=1, seed=1)))
    row = np.array([[-np.inf, 1, -np.inf, -np.inf]], np.float32)
    assert {sampler.sample_rows([1], row)[0].token for _ in range(20)} == {1}


def test_a_mask_that_allows_nothing_draws_no_token_and_leaves_the_other_rows():
    sampler, logits = HostSampler(4), np.array([[0, 1, 2, 3], [0, 1, 2, 3]], np.float32)
    for seq_id in (1, 2):
        sampler.admit(Admission(seq_id, np.array([0]), SamplingParams(temperature=0, repetition_penalty=9.0)))
    drawn = sampler.sample_rows([1, 2], logits, {1: pack([False] * 4)})
    assert [s.token for s in drawn] == [NO_TOKEN, 3]
    assert (sampler.last(1), sampler.last(2)) == (0, 3)
    assert sampler.sample_rows([1], logits[:1])[0].token == 3
