"""QuantizedLinear against the same rounding in fp64: odd shapes, zero points, rows apart from each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from targets.onnxruntime.pack import pack_codes, pack_zeros
from tests.targets.onnxruntime.native import Array, run

TOLERANCE = 2e-6
"""Of the largest result: fp32 sums of a few dozen blocks."""

CASES = [
    # bits, block, N, K
    (4, 32, 8, 32), (4, 32, 1, 32), (4, 32, 13, 96), (4, 64, 48, 128), (4, 128, 40, 200), (4, 256, 9, 512),
    (8, 32, 8, 32), (8, 32, 5, 40), (8, 64, 130, 192), (8, 128, 16, 384),
]  # fmt: skip


def weights(bits: int, block: int, n: int, k: int, zeros: bool, seed: int = 0) -> dict[str, Array | None]:
    """Random packed weights, as MatMulNBits has them."""
    random = np.random.default_rng(seed)
    blocks = -(-k // block)
    codes = random.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    points = random.integers(0, 1 << bits, (n, blocks), dtype=np.uint8)
    return {
        "codes": pack_codes(codes, bits, block),
        "scales": random.uniform(0.01, 0.1, (n, blocks)).astype(np.float32),
        "zeros": pack_zeros(points, bits) if zeros else None,
    } | {"plain": codes, "points": points if zeros else None}


def product(x: Array, w: dict[str, Any], bits: int, block: int) -> Array:
    """x (rows, K) rounded to int8 by blocks of 32, times the weights' values, in fp64."""
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // 32) * 32), np.float32)
    padded[:, :k] = x
    by_block = padded.reshape(rows, -1, 32)
    largest = np.abs(by_block).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    rounded = np.rint(by_block * inverse) * (largest.astype(np.float64) / 127)
    groups = np.arange(k) // block
    points = w["points"] if w["points"] is not None else np.full_like(w["scales"], 1 << (bits - 1))
    values = (w["plain"].astype(np.float64) - points[:, groups]) * w["scales"].astype(np.float64)[:, groups]
    return np.asarray(rounded.reshape(rows, -1)[:, :k] @ values.T)


def call(x: Array, w: dict[str, Any], bits: int, block: int, threads: int = 1) -> Array:
    constants = {name: w[name] for name in ("codes", "scales", "zeros")}
    n, k = w["plain"].shape
    return run("QuantizedLinear", {"x": x}, constants, threads=threads, N=n, K=k, bits=bits, block_size=block)[0]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "block", "n", "k"), CASES)
def test_equals_the_same_rounding_in_fp64(bits: int, block: int, n: int, k: int, zeros: bool) -> None:
    w = weights(bits, block, n, k, zeros)
    for rows in (1, 2, 3, 4, 7, 33):
        x = np.random.default_rng(rows).standard_normal((rows, k)).astype(np.float32)
        expected = product(x, w, bits, block)
        assert np.abs(call(x, w, bits, block) - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_extremes_do_not_saturate() -> None:
    """The largest codes and activations, of either sign: every sum of 16 bits is at its limit."""
    for bits in (4, 8):
        for code in (0, 1 << (bits - 1), (1 << bits) - 1):
            for signs in (np.ones(64), -np.ones(64), np.repeat([1.0, -1.0], 32), np.tile([1.0, -1.0], 32)):
                w = weights(bits, 32, 8, 64, zeros=True)
                w["plain"] = np.full((8, 64), code, np.uint8)
                w |= {"codes": pack_codes(w["plain"], bits, 32), "zeros": None, "points": None}
                x = signs.astype(np.float32)[None] * 3
                expected = product(x, w, bits, 32)
                assert np.abs(call(x, w, bits, 32) - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())


def test_a_wrong_zero_is_caught() -> None:
    """Negative control: one zero point off by one is far outside the tolerance."""
    w = weights(4, 32, 13, 96, zeros=True)
    x = np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    expected = product(x, w, 4, 32)
    w["points"][5, 1] ^= 1
    w["zeros"] = pack_zeros(w["points"], 4)
    assert np.abs(call(x, w, 4, 32) - expected).max() > 100 * TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_its_batch(bits: int) -> None:
    """To the last bit, whatever the number of rows and threads; a NaN stays in its row."""
    w = weights(bits, 32, 200, 96, zeros=False)
    x = np.random.default_rng(2).standard_normal((41, 96)).astype(np.float32)
    whole = call(x, w, bits, 32, threads=2)
    for rows in (1, 3, 4, 6):
        np.testing.assert_array_equal(call(x[:rows], w, bits, 32), whole[:rows])
    x[17, 5] = np.nan
    found = call(x, w, bits, 32, threads=2)
    assert np.isnan(found[17]).all()
    np.testing.assert_array_equal(np.delete(found, 17, 0), np.delete(whole, 17, 0))


def test_rows_of_zeros_and_no_rows() -> None:
    w = weights(4, 32, 16, 64, zeros=True)
    assert not call(np.zeros((2, 64), np.float32), w, 4, 32).any()
    assert call(np.zeros((0, 64), np.float32), w, 4, 32).shape == (0, 16)


@pytest.mark.parametrize(("change", "match"), [({"bits": 2}, "bits"), ({"block_size": 16}, "multiple of 32")])
def test_refuses_what_it_cannot_run(change: dict[str, int], match: str) -> None:
    w = weights(4, 32, 16, 64, zeros=False)
    constants = {name: w[name] for name in ("codes", "scales", "zeros")}
    attributes = {"N": 16, "K": 64, "bits": 4, "block_size": 32} | change
    with pytest.raises(Exception, match=match):
        run("QuantizedLinear", {"x": np.zeros((1, 64), np.float32)}, constants, **attributes)
