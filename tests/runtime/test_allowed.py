"""What masks allow, against the rule in one line: minus infinity where there is no bit, then the first maximum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import ExecutorError
from llmopt.runtime.allowed import AllowedTokens, allows
from llmopt.runtime.protocol import NO_TOKEN, Admission, SamplingParams
from llmopt.runtime.sampler import HostSampler

VOCAB = 70
"""Neither a multiple of 32 nor less than two words."""
LOGITS = st.lists(st.sampled_from([-np.inf, -2.0, 0.0, 1.0, 3.0]), min_size=VOCAB, max_size=VOCAB)
SPARSE = st.sets(st.integers(0, VOCAB - 1), max_size=3).map(lambda ids: [i in ids for i in range(VOCAB)])
DENSE = SPARSE.map(lambda bits: [not bit for bit in bits])
ANY = st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB)
MASKS = st.one_of(SPARSE, DENSE, ANY)


def pack(allowed):
    padded = np.zeros(96, bool)
    padded[:VOCAB] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


def rule(logits, allowed):
    """The token a greedy row draws, from lists."""
    found = [x if bit else -np.inf for x, bit in zip(logits, allowed)]
    return found.index(max(found)) if max(found) > -np.inf else NO_TOKEN


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(LOGITS, st.one_of(st.none(), MASKS)), min_size=1, max_size=6), st.integers(0, 200))
def test_greedy_rows_draw_what_the_rule_says(rows, kept):
    """Twice over, so that every mask also comes from the memory, whatever that still holds."""
    for logits, _ in rows:
        logits[5] = max(logits[5], -2.0)  # a row without a finite maximum is an error of its own
    sampler = HostSampler(VOCAB)
    sampler._allowed = AllowedTokens(VOCAB, kept)
    for i in range(len(rows)):
        sampler.admit(Admission(i, np.array([0]), SamplingParams(temperature=0)))
    masks = {i: pack(allowed) for i, (_, allowed) in enumerate(rows) if allowed is not None}
    expected = [rule(logits, [True] * VOCAB if allowed is None else allowed) for logits, allowed in rows]
    for _ in range(2):
        drawn = sampler.sample_rows(range(len(rows)), np.array([x for x, _ in rows], np.float32), masks)
        assert [s.token for s in drawn] == expected


@settings(max_examples=300, deadline=None)
@given(LOGITS, MASKS)
def test_only_the_allowed_logits_are_left(logits, allowed):
    x = np.array(logits, np.float32)
    left = AllowedTokens(VOCAB).of(pack(allowed)).only(x)
    assert left.tolist() == [value if bit else -np.inf for value, bit in zip(logits, allowed)]
    assert x.tolist() == logits


@given(MASKS)
def test_allows_is_the_bit(allowed):
    assert [allows(pack(allowed), token) for token in range(VOCAB)] == allowed


def test_nothing_allowed_and_nothing_finite_draw_no_token():
    known, x = AllowedTokens(VOCAB), np.full(VOCAB, -np.inf, np.float32)
    x[9] = 1
    nothing, others = [False] * VOCAB, [token != 9 for token in range(VOCAB)]
    assert known.of(pack(nothing)).best(x) == NO_TOKEN
    assert known.of(pack(others)).best(x) == NO_TOKEN
    assert known.of(pack([True] * VOCAB)).best(x) == 9


def test_what_is_kept_is_bounded():
    known = AllowedTokens(VOCAB, kept_ids=10)
    for token in range(VOCAB):
        mask = pack([i in (token, 3) for i in range(VOCAB)])
        assert known.of(mask) is known.of(mask)
        assert sum(len(a.ids) for a in known._known.values()) <= 10
    assert len(known._known) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error_under_a_mask_too(bad):
    sampler, x = HostSampler(VOCAB), np.zeros((1, VOCAB), np.float32)
    sampler.admit(Admission(1, np.array([0]), SamplingParams(temperature=0)))
    x[0, 4] = bad
    with pytest.raises(ExecutorError, match="not finite"):
        sampler.sample_rows([1], x, {1: pack([token == 6 for token in range(VOCAB)])})
