"""Every architecture on every target: ragged batches of prefill chunks and decodes against Hugging Face eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from llmopt.program import OpCall, Program
from llmopt.registry import load_executor_module
from llmopt.target import LoadOptions
from tests.architectures import ARCHITECTURES
from tests.targets.models import PROMPTS, Compiled, compiled, worst
from tests.targets.onnxruntime.build import executor
from tests.targets.ragged import RaggedDriver

TOLERANCE = 1e-5
OPTIONS = LoadOptions(max_sequences=4, max_context=64)
LAYOUTS = {"paged": ", block_size: 4", "slots": "", "ring": ", max_chunk: 4"}


def reference(model: Compiled, program: Program | None = None) -> Any:
    """The reference executor: its states start full of NaN."""
    return load_executor_module("reference").ReferenceExecutor(program or model.program, model.tensors(), OPTIONS)


def onnxruntime(model: Compiled, program: Program | None = None) -> Any:
    """The onnxruntime executor over freshly emitted files, in onnxruntime's own operators."""
    return executor(program or model.program, model.weights, OPTIONS, native_kernels=False)


def native(model: Compiled, program: Program | None = None) -> Any:
    """The same with llmopt's CPU kernels."""
    return executor(program or model.program, model.weights, OPTIONS)


def plain(model: Compiled, program: Program | None = None) -> Any:
    """The form for the CUDA provider, here on the CPU: attention in standard operators."""
    return executor(program or model.program, model.weights, OPTIONS, form_for="cuda", native_kernels=False)


TARGETS = {
    "reference": (reference, "paged"),
    "onnxruntime": (onnxruntime, "slots"),
    "native": (native, "slots"),
    "plain": (plain, "slots"),
}
PROGRAM_OF = {"native": "onnxruntime", "plain": "onnxruntime"}
"""The target whose program another form runs."""


def error(model: Compiled, runner: Any, shift: int = 0) -> float:
    """Worst relative error of an executor over the model's sequences."""
    return worst(RaggedDriver(runner, shift=shift).logits(model.sequences, list(PROMPTS)), model.expected)


# Each is captured once, by one worker.
EVERY_ARCHITECTURE = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"conformance of {name}")) for name in ARCHITECTURES
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_reference_matches_eager(architecture: str, layout: str) -> None:
    model = compiled(architecture, "reference", layout, LAYOUTS[layout])
    assert error(model, reference(model)) <= TOLERANCE


@pytest.mark.parametrize("build", [onnxruntime, native, plain])
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_onnxruntime_matches_eager(architecture: str, build: Callable[[Compiled], Any]) -> None:
    model = compiled(architecture, "onnxruntime", "slots")
    assert error(model, build(model)) <= TOLERANCE


def mutated(program: Program, op: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Program:
    """The program with the arguments of every call of ``op`` changed."""

    def edit(call: OpCall) -> OpCall:
        return replace(call, args={**call.args, **change(call.args)}) if call.op == op else call

    functions = {n: replace(f, calls=tuple(map(edit, f.calls))) for n, f in program.functions.items()}
    return program.with_functions(functions)


def narrower(args: dict[str, Any]) -> dict[str, Any]:
    return {"window": args["window"] - 1} if args["window"] else {}


WRONG = {
    "window": ("mistral", narrower),
    "sinks": ("gpt_oss", lambda args: {"sinks": None}),
    "softcap": ("gemma2", lambda args: {"softcap": 0.0}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_attention_is_caught(what: str, target: str) -> None:
    (architecture, change), (build, layout) = WRONG[what], TARGETS[target]
    model = compiled(architecture, PROGRAM_OF.get(target, target), layout, LAYOUTS[layout])
    assert error(model, build(model, mutated(model.program, "llmopt.cached_attention", change))) > 10 * TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_shifted_position_is_caught(architecture: str, target: str) -> None:
    build, layout = TARGETS[target]
    model = compiled(architecture, PROGRAM_OF.get(target, target), layout, LAYOUTS[layout])
    assert error(model, build(model), shift=1) > 10 * TOLERANCE
