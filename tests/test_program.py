"""Program: canonical JSON, dimension expressions, malformed text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.errors import ArtifactError
from llmopt.program import (
    DimExpr,
    DType,
    Function,
    OpCall,
    Program,
    Ref,
    StateGroup,
    StatePlan,
    StateSpec,
    TensorType,
    WeightPart,
    WeightType,
    eval_dim,
)


def program() -> Program:
    """One of everything the format can hold."""
    call = OpCall(
        "aten.view.default",
        {
            "self": Ref("x"),
            "size": (1, DimExpr("2*T"), -1),
            "dtype": DType("float32"),
            "eps": 1e-5,
            "inf": float("inf"),
        },
        ("y",),
        "model.layers.0",
    )
    types = {"x": TensorType(("T", 4), "float32"), "y": TensorType((1, "2*T", 2), "float32")}
    group = StateGroup("kv0", "paged", 16, (StateSpec("k_0", 2, 8, "float32", 0),), window=4, shareable=True)
    return Program(
        functions={"step": Function("step", ("x",), (call,), ("y",), types, {"k_0": "y"})},
        entry_points={"decode": "step", "extend": "step"},
        weights={"a.weight": WeightType(TensorType((4, 4), "bfloat16"), (WeightPart("q.weight", 0, 4),))},
        states=StatePlan((group,)),
        dims={"T": (2, 128)},
        max_context=128,
        vocab_size=32,
    )


def test_round_trip_is_exact():
    text = program().to_json()
    assert Program.from_json(text) == program()
    assert Program.from_json(text).to_json() == text
    assert Program.from_json(text).digest() == program().digest()


@pytest.mark.parametrize("damage", [lambda t: t[:-20], lambda t: t.replace('"calls"', '"cals"'), lambda t: "[]"])
def test_malformed_text_is_an_artifact_error(damage):
    with pytest.raises(ArtifactError, match="malformed"):
        Program.from_json(damage(program().to_json()))


def test_newer_format_names_both_versions():
    with pytest.raises(ArtifactError, match=r"format 2, this llmopt reads 1"):
        Program.from_json(program().to_json().replace('"format": 1', '"format": 2', 1))


@given(st.integers(0, 1000), st.integers(1, 9))
def test_dimension_expressions(t, k):
    assert eval_dim(f"{k}*T + T//{k} - 1", {"T": t}) == k * t + t // k - 1


@pytest.mark.parametrize("expr", ["U", "T**2", "f(T)", "__import__('os')"])
def test_bad_expressions_are_refused(expr):
    with pytest.raises(ArtifactError, match="bad dimension expression"):
        eval_dim(expr, {"T": 1})


def test_ring_chunk_keeps_the_window():
    ring = StateGroup("w", "ring", 4 + 8 + 3 - 1, (), window=8, sinks=4)
    assert ring.max_chunk() == 3
    assert StateGroup("p", "paged", 16, ()).blocks_for(17) == 2
