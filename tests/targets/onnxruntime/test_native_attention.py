"""CachedAttention and CodedAttention against fp64: every option, lengths across blocks of keys, NaN (codes: -128, which
no row is written as) in every slot nobody wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from tests.targets.onnxruntime.native import Array, run

TOLERANCE = 1e-5
"""Of the largest result, as for every target."""


@dataclass(frozen=True)
class Case:
    """A call: B sequences with ``past`` tokens and ``rows`` new ones each."""

    past: tuple[int, ...] = (5,)
    rows: int = 1
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    capacity: int = 96
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    rotary: int = 0
    interleaved: bool = False
    packed: bool = False
    codes: bool = False


CASES = {
    "decode": Case(),
    "first token": Case(past=(0,)),
    "a batch": Case(past=(5, 0, 63, 31, 32, 40), width=64, heads=6),
    "a prompt": Case(past=(0,), rows=70),
    "a chunk": Case(past=(29,), rows=37, heads=8, kv_heads=2),
    "one kv head": Case(past=(40,), rows=3, heads=12, kv_heads=1),
    "as many kv heads": Case(past=(40, 7), kv_heads=4),
    "window": Case(past=(50, 3), window=7),
    "window over a prompt": Case(past=(0,), rows=80, window=33),
    "softcap": Case(past=(50,), softcap=0.7),
    "sinks": Case(past=(50, 2), sinks=True),
    "rotated": Case(past=(9,), rows=4, rotary=8, packed=True),
    "partly rotated": Case(past=(9, 11), rotary=4, width=24),
    "interleaved": Case(past=(9,), rows=4, rotary=8, interleaved=True, packed=True),
    "all": Case(past=(33,), rows=20, window=21, softcap=1.1, sinks=True, rotary=32, width=72, packed=True),
    "widest": Case(past=(33,), width=256, heads=2, kv_heads=1),
    "full": Case(past=(90,), rows=6),
    "codes": Case(past=(40, 3), codes=True),
    "codes of a chunk": Case(past=(29,), rows=37, heads=8, kv_heads=2, codes=True),
    "codes, all": Case(
        (33,), rows=20, window=21, softcap=1.1, sinks=True, rotary=32, width=72, packed=True, codes=True
    ),
    "codes, widest": Case(past=(33,), width=256, heads=2, kv_heads=1, codes=True),
}


def inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """Random tensors; NaN in every slot past a sequence's past."""
    random = np.random.default_rng(seed)
    batch, shape = len(case.past), (len(case.past), case.kv_heads, case.capacity, case.width)

    def draw(*size: int) -> Array:
        return random.standard_normal(size).astype(np.float32)

    states = [random.integers(-127, 128, shape, np.int8) if case.codes else draw(*shape) for _ in "kv"]
    for state in states:
        for b, past in enumerate(case.past):
            state[b, :, past:] = -128 if case.codes else np.nan
    angles = random.uniform(0, 6, (case.capacity + 9, case.rotary))
    positions = [[p + 3 + r for r in range(case.rows)] for p in case.past]
    return {
        "q": draw(batch, case.rows, case.heads, case.width),
        "k": draw(batch, case.rows, case.kv_heads, case.width),
        "v": draw(batch, case.rows, case.kv_heads, case.width),
        "past_k": states[0],
        "past_v": states[1],
        "last": np.array([p + case.rows - 1 for p in case.past], np.int32),
        "longest": np.array(max(case.past) + case.rows, np.int32),
        "cos": np.cos(angles).astype(np.float32) if case.rotary else None,
        "sin": np.sin(angles).astype(np.float32) if case.rotary else None,
        "positions": np.array(positions, np.int64) if case.rotary else None,
        "bias": None,
        "sinks": draw(case.heads) if case.sinks else None,
        "k_scale": random.uniform(0.01, 0.02, case.kv_heads).astype(np.float32) if case.codes else None,
        "v_scale": random.uniform(0.01, 0.02, case.kv_heads).astype(np.float32) if case.codes else None,
    }


def call(case: Case, given: dict[str, Any], threads: int = 2) -> list[Array]:
    """(B, S, H, D) and the states, from the operator."""
    batch, rows = given["q"].shape[:2]
    flat = {name: given[name].reshape(batch, rows, -1) for name in "qkv"}
    if case.packed:
        flat = {"q": np.concatenate(list(flat.values()), -1), "k": None, "v": None}
    attributes = {
        "num_heads": case.heads,
        "kv_num_heads": case.kv_heads,
        "scale": 0.4,
        "softcap": case.softcap,
        "local_window_size": case.window,
        "rotary_interleaved": int(case.interleaved),
    }
    op, kept = ("CodedAttention", TensorProto.INT8) if case.codes else ("CachedAttention", TensorProto.FLOAT)
    out, *states = run(op, {**given, **flat}, {}, (TensorProto.FLOAT, kept, kept), threads, **attributes)
    return [out.reshape(given["q"].shape), *states]


def rotated(case: Case, given: dict[str, Any], x: Array) -> Array:
    """x (B, S, heads, D) with its first elements rotated, fp64."""
    out: Array = x.astype(np.float64)
    if case.rotary:
        cos, sin = (given[name][given["positions"]][:, :, None].astype(np.float64) for name in ("cos", "sin"))
        half = case.rotary
        first = slice(0, 2 * half, 2) if case.interleaved else slice(0, half)
        second = slice(1, 2 * half, 2) if case.interleaved else slice(half, 2 * half)
        u, v = out[..., first].copy(), out[..., second].copy()
        out[..., first], out[..., second] = u * cos - v * sin, v * cos + u * sin
    return out


def oracle(case: Case, given: dict[str, Any]) -> list[Array]:
    """The same in fp64, a row and head at a time."""
    q, k, v = rotated(case, given, given["q"]), rotated(case, given, given["k"]), given["v"]
    keys, values = (given[name].astype(np.float64) for name in ("past_k", "past_v"))
    k_scale, v_scale = (given[f"{name}_scale"] if case.codes else np.ones(case.kv_heads) for name in "kv")
    if case.codes:
        k, v = (np.rint(x / s[:, None]).clip(-127, 127) for x, s in ((k, k_scale), (v, v_scale)))
    out = np.zeros(q.shape)
    for b, past in enumerate(case.past):
        new = slice(past, past + case.rows)
        keys[b, :, new], values[b, :, new] = k[b].transpose(1, 0, 2), v[b].transpose(1, 0, 2)
        for r in range(case.rows):
            stop = past + r + 1
            start = max(0, stop - case.window) if case.window else 0
            for h in range(case.heads):
                kv = h // (case.heads // case.kv_heads)
                scores = keys[b, kv, start:stop] @ q[b, r, h] * 0.4 * k_scale[kv]
                scores = np.tanh(scores / case.softcap) * case.softcap if case.softcap else scores
                sink = np.exp(float(given["sinks"][h])) if case.sinks else 0.0
                weights = np.exp(scores)
                out[b, r, h] = weights @ values[b, kv, start:stop] / (weights.sum() + sink) * v_scale[kv]
    return [out, keys, values]


def error(case: Case, given: dict[str, Any], expected: list[Array]) -> float:
    """Worst difference, relative to each tensor's largest; NaN must be where it is expected."""
    worst = 0.0
    for found, want in zip(call(case, given), expected, strict=True):
        np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
        worst = max(worst, float(np.nanmax(np.abs(found - want)) / np.nanmax(np.abs(want))))
    return worst


@pytest.mark.parametrize("name", CASES)
def test_equals_fp64(name: str) -> None:
    case = CASES[name]
    given = inputs(case)
    assert error(case, given, oracle(case, given)) <= TOLERANCE


@pytest.mark.parametrize(
    "change", [{"window": 20}, {"softcap": 0.9}, {"sinks": False}, {"interleaved": True}, {"rotary": 16}], ids=str
)
def test_every_option_counts(change: dict[str, Any]) -> None:
    """Negative control: another option's answer is far outside the tolerance."""
    case = CASES["all"]
    other = replace(case, **change)
    given = inputs(case)
    wrong = {**given, "cos": given["cos"][:, : other.rotary].copy(), "sin": given["sin"][:, : other.rotary].copy()}
    wrong["sinks"] = given["sinks"] if other.sinks else None
    assert error(other, wrong, oracle(case, given)) > 100 * TOLERANCE


def test_a_row_does_not_depend_on_its_batch_or_chunk() -> None:
    """To the last bit: a prompt at once, in chunks, or token by token beside other sequences."""
    case = Case(past=(0,), rows=75, window=40, heads=6, width=64)
    given = inputs(case)
    whole = call(case, given)[0]
    states = given["past_k"], given["past_v"]
    pieces = []
    for start, stop in ((0, 33), (33, 34), (34, 72), (72, 73), (73, 75)):
        part = {**given, **{n: given[n][:, start:stop] for n in "qkv"}, "past_k": states[0], "past_v": states[1]}
        part["last"], part["longest"] = np.array([stop - 1], np.int32), np.array(stop, np.int32)
        out, *states = call(replace(case, past=(start,), rows=stop - start), part)
        pieces.append(out)
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)

    batch = replace(CASES["a batch"], window=40)
    many = inputs(batch)
    together = call(batch, many)[0]
    for b, past in enumerate(batch.past):
        alone = {n: v[b : b + 1] if n in ("q", "k", "v", "past_k", "past_v", "last") else v for n, v in many.items()}
        alone["longest"] = np.array(past + 1, np.int32)
        np.testing.assert_array_equal(call(replace(batch, past=(past,)), alone)[0], together[b : b + 1])


@pytest.mark.parametrize("name", ["a batch", "rotated", "all"])
def test_rows_in_one_line(name: str) -> None:
    """(1, B S, ·) is (B, S, ·): the same bits, in the shape that was given."""
    case = CASES[name]
    given = inputs(case)
    flat = {**given, **{n: given[n].reshape(1, -1, *given[n].shape[2:]) for n in "qkv"}}
    if case.rotary:
        flat["positions"] = given["positions"].reshape(1, -1)
    out, *states = call(case, flat)
    assert out.shape == flat["q"].shape
    for found, expected in zip((out.reshape(given["q"].shape), *states), call(case, given), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_sequences_of_unequal_rows_are_refused() -> None:
    case = Case(past=(4, 4))
    given = inputs(case)
    with pytest.raises(Exception, match="as many rows"):
        call(case, {**given, **{n: given[n][:1].repeat(3, 1) for n in "qkv"}})


def test_codes_without_scales_are_refused() -> None:
    case = CASES["codes"]
    for name in ("k_scale", "v_scale"):
        for wrong in (None, np.ones(3, np.float32)):
            with pytest.raises(Exception, match="a scale a head"):
                call(case, {**inputs(case), name: wrong})


def test_what_codes_cannot_hold_saturates() -> None:
    case = CASES["codes"]
    given = inputs(case)
    _, keys, values = call(case, {**given, "k": given["k"] * 1e4, "v": given["v"] * 1e4})
    for state, new in ((keys, given["k"]), (values, given["v"])):
        for b, past in enumerate(case.past):
            np.testing.assert_array_equal(state[b, :, past], np.sign(new[b, 0]) * 127)


def test_a_length_outside_the_state_is_refused() -> None:
    case = CASES["decode"]
    for last in (-1, case.capacity):
        with pytest.raises(Exception, match="length outside"):
            call(case, {**inputs(case), "last": np.array([last], np.int32)})
