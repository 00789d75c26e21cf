"""Times of linears that the cuda target tells passes: those of its table, of exactly the shape and format asked for."""

from __future__ import annotations

import json

import pytest

from llmopt.registry import load_target
from targets.cuda.tuning import measured
from targets.cuda.tuning.table import builtin


def test_a_measured_shape_has_its_time() -> None:
    linear_us = load_target("cuda").info.linear_us
    (entries,) = json.loads(builtin(90).read_text())["compilers"].values()
    key, config = next((k, c) for k, c in entries["gemv"].items() if k.endswith("1x28672x4096 gated"))
    found = linear_us(28672, 4096, "bfloat16", None, 4096)
    assert found is not None
    assert found <= config["us"], key
    assert linear_us(28672, 4095, "bfloat16", None, 4096) is None
    assert linear_us(28672, 4096, "float16", None, 4096) is None


def test_quantized_times_are_looked_up_by_format(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"gemm_q": {"int4g128 1x64x256": {"us": 3.0}, "int8 1x64x256": {"us": 5.0}, "int4g32 1x64x256": {}}}
    monkeypatch.setattr(measured, "table", lambda: table)
    assert measured.linear_us(64, 256, "bfloat16", 4, 128) == 3.0
    assert measured.linear_us(64, 256, "bfloat16", 8, 256) == 5.0
    assert measured.linear_us(64, 256, "bfloat16", 4, 32) == pytest.approx(3.0 * (4 + 16 / 32) / (4 + 16 / 128))
    assert measured.linear_us(64, 256, "bfloat16", 8, 128) == pytest.approx(5.0 * (8 + 16 / 128) / (8 + 16 / 256))
    assert measured.linear_us(64, 512, "bfloat16", 4, 128) is None


def test_other_targets_measured_nothing() -> None:
    assert load_target("onnxruntime").info.linear_us(64, 64, "float32", None, 64) is None
