"""Attention in every form against the reference target, on ragged batches over the same states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from llmopt.errors import TargetError
from llmopt.registry import load_executor_module
from llmopt.runtime.executors.onnxruntime import MODEL_FILE, NATIVE_MODEL_FILE
from tests.targets.models import worst
from tests.targets.onnxruntime.attention import Attention
from tests.targets.onnxruntime.build import OPTIONS, build, executor
from tests.targets.ragged import RaggedDriver

GROUPED = {
    "plain": Attention(rotate=0),
    "rotated": Attention(),
    "fused": Attention(fused=True),
    "interleaved": Attention(interleaved=True),
    "partial": Attention(head_dim=32, value_dim=32, rotate=8, fused=True),
    "odd pairs": Attention(head_dim=24, value_dim=24, rotate=6, fused=True),
    "few pairs": Attention(rotate=2, interleaved=True),
    "window": Attention(window=5),
    "softcap": Attention(softcap=0.8),
    "sinks": Attention(sinks=True),
    "all": Attention(window=3, softcap=0.8, sinks=True, kv_heads=4, fused=True),
    "one kv head": Attention(kv_heads=1, head_dim=64, value_dim=64, rotate=32),
    "q not rotated": Attention(mixed=True),
}
STANDARD = {
    "odd heads": Attention(head_dim=12, value_dim=12, rotate=6, fused=True),
    "wider values": Attention(value_dim=32),
    "narrower values, all": Attention(value_dim=8, window=4, softcap=0.8, sinks=True, fused=True),
    "sink tokens": Attention(window=4, sink_tokens=2),
    "no rotation": Attention(value_dim=24, rotate=0),
}
CODED = {
    "codes": Attention(codes=True),
    "codes, all": Attention(codes=True, window=3, softcap=0.8, sinks=True, kv_heads=4, fused=True),
    "codes, few pairs": Attention(codes=True, rotate=2, interleaved=True),
}
CODED_STANDARD = {
    "codes, odd heads": Attention(codes=True, head_dim=12, value_dim=12, rotate=6, fused=True),
    "codes, wider values": Attention(codes=True, value_dim=32, window=4, sink_tokens=2),
}
TWICE = {
    "codes twice": Attention(codes=True, twice=True),
    "grouped, then standard": Attention(twice=True, fused=True),
    "standard twice": Attention(twice=True, value_dim=8, window=4),
}
LENGTHS, PROMPTS = (23, 9, 14), [17, 1, 6]


def operators(layer: Attention, file: str = MODEL_FILE) -> set[str]:
    """Operator names of an emitted model; none where there is no such file."""
    model = build(layer.program(), layer.readers()).files.get(file, b"")
    return {node.op_type for node in onnx.load_model_from_string(model).graph.node}


def logits(runner: Any) -> list[Any]:
    random = np.random.default_rng(1)
    sequences = [random.integers(0, 30, n).astype(np.int64) for n in LENGTHS]
    return RaggedDriver(runner).logits(sequences, PROMPTS)


def reference(layer: Attention) -> list[Any]:
    module = load_executor_module("reference")
    return logits(module.ReferenceExecutor(layer.program(), layer.tensors(), OPTIONS))


def emitted(layer: Attention, native: bool = True) -> Any:
    return executor(layer.program(), layer.readers(), native_kernels=native)


LAYERS_BY_NAME = {**GROUPED, **STANDARD, **CODED, **CODED_STANDARD, **TWICE}
# Each layer is traced once, by one worker.
LAYERS = [pytest.param(name, marks=pytest.mark.xdist_group(f"layer {name}")) for name in LAYERS_BY_NAME]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_matches_the_reference(name: str, native: bool) -> None:
    layer = LAYERS_BY_NAME[name]
    assert worst(logits(emitted(layer, native)), reference(layer)) <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"window": 5},
        {"softcap": 0.5},
        {"sinks": True},
        {"rotate": 0},
        {"interleaved": True},
        {"window": 4, "sink_tokens": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("native", [True, False])
def test_every_option_counts(change: dict[str, Any], native: bool) -> None:
    """Negative control: the comparison fails when one option of the layer differs."""
    base = Attention(window=4) if "sink_tokens" in change else Attention()
    assert worst(logits(emitted(replace(base, **change), native)), reference(base)) > 1e-3


def test_kernel_choice() -> None:
    """GroupQueryAttention, in the native form CachedAttention, where it has a kernel; standard operators elsewhere."""
    assert all("GroupQueryAttention" in operators(a) for a in GROUPED.values())
    assert all("CachedAttention" in operators(a, NATIVE_MODEL_FILE) for a in GROUPED.values())
    assert not any("GroupQueryAttention" in operators(a) for a in STANDARD.values())
    assert all("CodedAttention" in operators(a, NATIVE_MODEL_FILE) for a in CODED.values())
    coded = [*CODED.values(), *CODED_STANDARD.values()]
    assert not any("GroupQueryAttention" in operators(a) for a in coded)
    assert not any(operators(a, NATIVE_MODEL_FILE) for a in (*STANDARD.values(), *CODED_STANDARD.values()))


@pytest.mark.parametrize("name", ["all", "plain"])
@pytest.mark.parametrize("kind", ["native", "grouped", "standard"])
def test_unwritten_slots_are_not_read(name: str, kind: str) -> None:
    """NaN wherever nothing was written changes nothing."""
    layer = replace(GROUPED[name], value_dim=8) if kind == "standard" else GROUPED[name]
    runner = emitted(layer, native=kind == "native")
    for array in runner.states.memory.arrays.values():  # type: ignore[attr-defined]
        array.fill(np.nan)
    assert worst(logits(runner), reference(layer)) <= 1e-5


@pytest.mark.parametrize("native", [True, False])
def test_codes_lose_what_they_lose(native: bool) -> None:
    """Negative control: the comparison tells codes from numbers."""
    plain = reference(Attention())
    assert 1e-3 < worst(logits(emitted(Attention(codes=True), native)), plain) < 0.1


def test_refuses_rings_and_uncached_attention() -> None:
    program = Attention().program()
    function = program.functions["step"]
    for change, match in (({"ring": True}, "ring"), (None, "rewrite_kv_cache")):
        calls = tuple(
            c if c.op != "llmopt.cached_attention"
            else replace(c, args={**c.args, **change}) if change else replace(c, op="llmopt.attention")
            for c in function.calls
        )  # fmt: skip
        changed = program.with_functions({"step": replace(function, calls=calls)})
        with pytest.raises(TargetError, match=match):
            build(changed, Attention().readers())
