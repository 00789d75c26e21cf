"""Philox against the known answers of Random123, and the numbers made from it."""

import numpy as np
import pytest

from llmopt.runtime.philox import philox4x32, uniforms

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    """Hexadecimal words as a column of uint32."""
    return np.array([[int(w, 16)] for w in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert np.array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_columns_do_not_depend_on_each_other():
    counters = np.hstack([words(c) for c, _, _ in KNOWN_ANSWERS])
    keys = np.hstack([words(k) for _, k, _ in KNOWN_ANSWERS])
    assert np.array_equal(philox4x32(counters, keys), np.hstack([words(e) for _, _, e in KNOWN_ANSWERS]))


def test_uniforms_use_the_whole_seed_and_the_position():
    seeds = [0, 1, 1 << 32, (1 << 64) - 1]
    rows = [(s, p) for s in seeds for p in (0, 1, 2**32 - 1)]
    values = uniforms([s for s, _ in rows], [p for _, p in rows])
    assert len(set(values.tolist())) == len(rows)
    assert [uniforms([s], [p])[0] for s, p in rows] == values.tolist()
    assert 0.0 <= values.min() <= values.max() < 1.0


def test_53_bits_of_words_zero_and_one():
    first, second, _, _ = (int(w, 16) for w in KNOWN_ANSWERS[0][2].split())
    assert uniforms([0], [0])[0] == ((first << 21) | (second >> 11)) / 2**53


def test_uniforms_are_uniform():
    values = uniforms([7] * 100_000, range(100_000))
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    chi2 = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert 50 < chi2 < 155  # 99 degrees of freedom: 0.1% on each side is beyond 62 and 148
