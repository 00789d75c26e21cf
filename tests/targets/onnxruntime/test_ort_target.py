"""The target: options, layouts, determinism, the checker, what the artifact's files hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from llmopt.errors import ConfigError, TargetError
from llmopt.program import OpCall, Ref, StatePlan
from llmopt.runtime.executors.onnxruntime import COPY_FILE, MODEL_FILE
from targets.onnxruntime import target as module
from targets.onnxruntime.graph import WEIGHTS_FILE
from targets.onnxruntime.readers import materialize
from tests.targets.models import compiled, worst
from tests.targets.onnxruntime.attention import Attention
from tests.targets.onnxruntime.build import build, executor
from tests.targets.ragged import RaggedDriver

LAYER = Attention(fused=True)
PROGRAM, WEIGHTS = LAYER.program(), LAYER.readers()


@pytest.mark.parametrize(
    ("options", "match"),
    [({"acuracy_level": 4}, "did you mean accuracy_level"), ({"x": 1}, "options are"),
     ({"native_kernels": 1}, "not true or false"),
     ({"accuracy_level": 2}, "not supported"), ({"accuracy_level": True}, "not supported"),
     ({"accuracy_level": "4"}, "not supported")],
)  # fmt: skip
def test_options_are_strict(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build(PROGRAM, WEIGHTS, **options)


def test_only_slots() -> None:
    group = PROGRAM.states.groups[0]
    for groups in ((), (replace(group, kind="paged"),), (group, group)):
        with pytest.raises(TargetError, match="slots"):
            build(replace(PROGRAM, states=StatePlan(groups)), WEIGHTS)


def test_an_unknown_op_is_named() -> None:
    function = PROGRAM.functions["step"]
    odd = OpCall("aten.fft_fft.default", {"self": Ref("input_ids")}, ("z",), "model.layers.3")
    changed = PROGRAM.with_functions({"step": replace(function, calls=(odd, *function.calls))})
    with pytest.raises(TargetError, match=r"aten\.fft_fft\.default.*model\.layers\.3"):
        build(changed, WEIGHTS)


def test_the_checker_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a graph that reads a value nobody makes does not leave the target."""
    honest = module.declare_outputs

    def broken(e: Any, function: Any) -> None:
        honest(e, function)
        e.graph.nodes[-1].input[0] = "nothing"

    build(PROGRAM, WEIGHTS)
    monkeypatch.setattr(module, "declare_outputs", broken)
    with pytest.raises(TargetError, match="not valid ONNX"):
        build(PROGRAM, WEIGHTS)


@pytest.mark.parametrize("architecture", ["gemma3", "gpt_oss"])
def test_bytes_are_deterministic_and_hold_no_weights(architecture: str) -> None:
    model = compiled(architecture, "onnxruntime", "slots")
    first, second = (build(model.program, model.weights) for _ in range(2))
    assert dict(first.files) == dict(second.files)
    assert list(first.weights) == list(second.weights) == sorted(first.weights)
    graph = onnx.load_model_from_string(first.files[MODEL_FILE]).graph
    outside = {t.name: t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert outside.keys() == first.weights.keys()
    assert {e.value for t in outside.values() for e in t.external_data} == {WEIGHTS_FILE}
    for name, tensor in outside.items():
        assert list(tensor.dims) == list(materialize(first.weights[name]).shape)
    onnx.checker.check_model(first.files[COPY_FILE])


def test_weights_stream_in_chunks() -> None:
    """Derived weights honour the chunk size and add up to the same tensor."""
    model = compiled("gemma2", "onnxruntime", "slots")
    for reader in build(model.program, model.weights).weights.values():
        whole, chunks = materialize(reader), list(reader.chunks(1 << 10))
        np.testing.assert_array_equal(np.concatenate(chunks) if whole.ndim else chunks[0], whole)
        assert all(c.nbytes <= 1 << 10 or len(c) == 1 for c in chunks if c.ndim)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral", "gpt2", "phi3-longrope", "gpt_oss"])
def test_float16(architecture: str) -> None:
    """A float16 program runs on the CPU provider too, within float16's rounding of eager."""
    model = compiled(architecture, "onnxruntime", "slots", dtype="float16")
    sequences = RaggedDriver(executor(model.program, model.weights)).logits(model.sequences, [17, 1, 6])
    assert worst(sequences, model.expected) <= 2e-2
