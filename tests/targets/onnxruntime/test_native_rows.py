"""GatedSilu and AddRmsNorm against fp64: odd widths, rows apart from each other, NaN in its row, few rows and many."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from llmopt.program import Program
from llmopt.runtime.executors.onnxruntime import MODEL_FILE, NATIVE_MODEL_FILE
from llmopt.target import WeightReader
from tests.targets.models import compiled
from tests.targets.onnxruntime.build import build
from tests.targets.onnxruntime.native import Array, run

TOLERANCE = 1e-6
"""Of the largest result: one fp32 exponential or root and a few products."""

WIDTHS = (1, 3, 8, 13, 64, 771)
SHAPES = ((1,), (2, 3), (1, 70))
"""Leading dimensions; 70 rows of 771 are more than one thread keeps to itself."""


def rows(shape: tuple[int, ...], seed: int = 0, scale: float = 3.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def silu(x: Array) -> Array:
    gate, up = np.split(x.astype(np.float64), 2, -1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up)


def gated(x: Array, threads: int = 2) -> Array:
    return run("GatedSilu", {"x": x}, {}, threads=threads)[0]


def norm(x: Array, residual: Array, gamma: Array, epsilon: float = 1e-5, threads: int = 2) -> list[Array]:
    fed = {"x": x, "residual": residual}
    return run("AddRmsNorm", fed, {"gamma": gamma}, outputs=(TensorProto.FLOAT,) * 2, threads=threads, epsilon=epsilon)


def normed(total: Array, gamma: Array, epsilon: float = 1e-5) -> Array:
    wide = total.astype(np.float64)
    return np.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon) * gamma)


def worst(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("width", WIDTHS)
def test_gate_equals_fp64(width: int) -> None:
    for shape in SHAPES:
        x = rows((*shape, 2 * width))
        assert worst(gated(x), silu(x)) <= TOLERANCE
    assert worst(gated(np.concatenate((x[..., width:], x[..., :width]), -1)), silu(x)) > 1e-3  # halves count


def test_gate_far_from_zero() -> None:
    """Where exp overflows the result is the limit; an infinity and a NaN come through."""
    gate = np.array([-3e38, -1e4, -89, -87.5, 0, 87.5, 1e4, np.inf, np.nan], np.float32)
    found = gated(np.concatenate((gate, np.ones_like(gate)))[None])[0]
    np.testing.assert_allclose(found, [0, 0, 0, 0, 0, 87.5, 1e4, np.inf, np.nan], atol=1e-30)


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_equals_fp64(width: int) -> None:
    gamma = rows((width,), 2)
    for shape in SHAPES:
        x, residual = rows((*shape, width)), rows((*shape, width), 1)
        found, total = norm(x, residual, gamma)
        np.testing.assert_array_equal(total, x + residual)
        assert worst(found, normed(total, gamma)) <= TOLERANCE
        assert worst(found, normed(total, gamma, 0.1)) > 1e-3  # epsilon counts


def test_a_row_does_not_depend_on_its_batch() -> None:
    """To the last bit, whatever the number of rows and threads; a NaN stays in its row."""
    x, residual, gamma = rows((130, 772)), rows((130, 772), 1), rows((772,), 2)
    whole = [gated(x), *norm(x, residual, gamma)]
    for few in (1, 3, 40):
        part = [gated(x[:few], 1), *norm(x[:few], residual[:few], gamma, threads=1)]
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(found, expected[:few])
    x[17, :] = np.nan
    for found, expected in zip([gated(x), *norm(x, residual, gamma)], whole, strict=True):
        assert np.isnan(found[17]).all()
        np.testing.assert_array_equal(np.delete(found, 17, 0), np.delete(expected, 17, 0))


def test_no_rows() -> None:
    assert gated(np.zeros((0, 6), np.float32)).shape == (0, 3)
    assert norm(rows((0, 4)), rows((0, 4)), rows((4,)))[1].shape == (0, 4)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(Exception, match="must be even"):
        gated(rows((2, 5)))
    with pytest.raises(Exception, match="one shape"):
        norm(rows((2, 4)), rows((1, 4)), rows((4,)))
    with pytest.raises(Exception, match="one shape"):
        norm(rows((2, 4)), rows((2, 4)), rows((5,)))


def operators(program: Program, weights: Mapping[str, WeightReader], file: str) -> set[str]:
    """Operators of a file of the build; none where it was not made."""
    data = build(program, weights).files.get(file)
    return {n.op_type for n in onnx.load_model_from_string(data).graph.node} if data else set()


def test_kernel_choice() -> None:
    """In the native form of a float32 graph, for what they compute; onnxruntime's operators everywhere else."""
    ours, theirs = {"GatedSilu", "AddRmsNorm"}, {"QuickGelu", "SkipSimplifiedLayerNormalization"}
    llama = compiled("llama", "onnxruntime", "slots")
    native, plain = (operators(llama.program, llama.weights, f) for f in (NATIVE_MODEL_FILE, MODEL_FILE))
    assert ours <= native
    assert not native & (theirs | {"Reshape"})
    assert theirs <= plain
    assert not plain & ours
