"""Accuracy math against brute force, and the bootstrap's coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmopt.report.accuracy import kl_divergence, paired_bootstrap, perplexity, token_nll

RNG = np.random.default_rng(0)


def brute_probabilities(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_nll_and_kl_match_brute_force(rows):
    p = RNG.normal(0, 3, (rows, 17)).astype(np.float32)
    q = RNG.normal(0, 3, (rows, 17)).astype(np.float32)
    targets = RNG.integers(0, 17, rows)
    nll, kl = token_nll(q, targets), kl_divergence(p, q)
    for i in range(rows):
        a, b = brute_probabilities(p[i].tolist()), brute_probabilities(q[i].tolist())
        assert nll[i] == pytest.approx(-math.log(b[targets[i]]), rel=1e-12)
        assert kl[i] == pytest.approx(math.fsum(x * math.log(x / y) for x, y in zip(a, b)), rel=1e-9)


def test_kl_is_zero_only_for_equal_distributions():
    logits = RNG.normal(size=(4, 9)).astype(np.float32)
    assert kl_divergence(logits, logits + 5).max() < 1e-12
    assert kl_divergence(logits, logits * 1.1).min() > 0


def test_huge_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert token_nll(logits, np.array([0])).tolist() == [0.0]
    assert token_nll(logits, np.array([1])).tolist() == [1e4]


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    nll = token_nll(np.zeros((10, 50), np.float32), RNG.integers(0, 50, 10))
    assert perplexity(nll) == pytest.approx(50)


def test_nothing_gives_nothing():
    empty = np.zeros((0, 5), np.float32)
    assert token_nll(empty, np.zeros(0, np.int64)).shape == kl_divergence(empty, empty).shape == (0,)


def test_bootstrap_point_is_the_ratio_of_perplexities():
    a, b = RNG.gamma(2, 1, (20, 30)), RNG.gamma(2, 1, (20, 30))
    interval = paired_bootstrap(a, b)
    assert interval.value == pytest.approx(perplexity(a) / perplexity(b) - 1)
    assert interval.low < interval.value < interval.high


def test_bootstrap_is_paired():
    """A constant difference has no spread, however much the windows differ."""
    b = RNG.normal(3, 1, (16, 1)) + RNG.normal(0, 0.5, (16, 64))
    interval = paired_bootstrap(b + 0.01, b)
    assert interval.high - interval.low < 1e-12
    assert interval.value == pytest.approx(math.expm1(0.01))


def test_bootstrap_draws_whole_windows():
    """Tokens of a window that err together must widen the interval as much as one value a window would."""
    shift = RNG.normal(0, 0.1, (40, 1))
    b = np.zeros((40, 100))
    together, alone = paired_bootstrap(b + shift, b), paired_bootstrap(shift, np.zeros((40, 1)))
    assert (together.low, together.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    scattered = paired_bootstrap(RNG.permuted(b + shift, axis=None), b)
    assert scattered.high - scattered.low < (together.high - together.low) / 4


def test_bootstrap_covers_the_truth_95_times_in_100():
    """The interval of a true change of zero holds zero in about 95% of experiments."""
    hits = 0
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(0, 0.1, (32, 8))
        hits += 0.0 in paired_bootstrap(noise, np.zeros_like(noise), draws=400, seed=seed)
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_finds_a_real_change():
    noise = RNG.normal(0, 0.01, (32, 64))
    assert 0.0 not in paired_bootstrap(noise + 0.01, np.zeros_like(noise))
