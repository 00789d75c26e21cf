"""The batch from which on bfloat16 is as fast as quantized weights, from times of a table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmopt.program import OpCall, Ref, TensorType, WeightType
from llmopt.report.sections import crossover_rows
from targets.cuda.tuning.crossover import crossover, crossovers


def table(ours: dict[int, float], plain: dict[int, float], form: str = "") -> dict[str, Any]:
    """Times of one shape by rows, a slower kernel beside each."""
    q = {f"w8a8-fp8 {m}x64x32{form}": {"us": us} for m, us in ours.items()}
    b = {f"bfloat16 {m}x64x32{form}": {"us": us} for m, us in plain.items()}
    slow = {key: {"us": config["us"] * 2} for key, config in b.items()}
    return {"gemm_w8a8": q, "gemm_q": {}, "gemm": slow, "gemv": b}


@pytest.mark.parametrize(
    ("ours", "plain", "rows", "measured"),
    [
        ({}, {}, None, []),
        ({1: 2.0}, {}, None, []),
        ({1: 2.0, 8: 3.0}, {1: 4.0, 16: 4.0}, None, ["1"]),
        ({1: 2.0, 8: 3.0, 64: 9.0, 256: 9.0}, {1: 4.0, 8: 4.0, 64: 9.0, 256: 8.0}, 64, ["1", "8", "64", "256"]),
        ({1: 5.0, 8: 3.0, 64: 9.0}, {1: 4.0, 8: 4.0, 64: 8.0}, 64, ["1", "8", "64"]),
        ({1: 5.0, 8: 5.0}, {1: 4.0, 8: 4.0}, 1, ["1", "8"]),
    ],
)
def test_crossover(ours: dict[int, float], plain: dict[int, float], rows: int | None, measured: list[str]) -> None:
    found = crossover(table(ours, plain), "w8a8-fp8", 64, 32)
    assert (found["rows"], list(found["us"])) == (rows, measured)
    assert crossover(table(ours, plain, " gated"), "w8a8-fp8", 64, 32) == found
    assert crossover(table(ours, plain), "w8a8-fp8", 32, 64)["us"] == {}


def call(**args: Any) -> OpCall:
    given = {"codes": Ref("w.codes"), "format": "fp8_e4m3", "bits": 8, "block_n": 1, "block_k": 32, **args}
    return OpCall("cuda.linear_8", given, ("y",))


def test_every_shape_once_as_inspect_shows_it() -> None:
    weights = {"w.codes": WeightType(TensorType((64, 32), "float8_e4m3fn"))}
    program: Any = SimpleNamespace(weights=weights)
    coded, gated = call(round="fp8_e4m3"), call(round="fp8_e4m3", gate="silu")
    calls = [coded, gated, coded, call(), OpCall("cuda.linear", {"weight": Ref("w")}, ("z",))]
    found = crossovers(calls, program, table({1: 2.0, 8: 9.0}, {1: 4.0, 8: 8.0}))
    assert [entry["weights"] for entry in found] == ["fp8", "w8a8-fp8"]
    manifest: Any = SimpleNamespace(notes={"crossover": {"sm_90": found}})
    assert crossover_rows(manifest) == [
        ("sm_90", "fp8", "64x32", "not measured"),
        ("sm_90", "w8a8-fp8", "64x32", "8 rows"),
    ]
    fast = {"gemm_w8a8": {"w8a8-fp8-fast 8x64x32": {"us": 3.0}}, "gemm": {"bfloat16 8x64x32": {"us": 4.0}}}
    assert [
        (e["weights"], e["us"]) for e in crossovers([coded, call(round="fp8_e4m3", interval=0)], program, fast)
    ] == [
        ("w8a8-fp8", {}),
        ("w8a8-fp8-fast", {"8": [3.0, 4.0]}),
    ]
    found = crossovers([coded], program, table({1: 2.0, 8: 7.0}, {1: 4.0, 8: 8.0}))
    manifest = SimpleNamespace(notes={"crossover": {"sm_90": found}})
    assert crossover_rows(manifest)[0][-1] == "none up to 8 rows"
    assert crossover_rows(SimpleNamespace(notes={})) == []  # type: ignore[arg-type]
