"""Every architecture on every target: ragged batches of prefill chunks and decodes against Hugging Face eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from llmopt.program import OpCall, Program
from llmopt.registry import load_executor_module, load_target
from llmopt.target import BuildContext, LoadOptions
from tests.architectures import ARCHITECTURES
from tests.targets.models import PROMPTS, Compiled, compiled, worst
from tests.targets.ragged import RaggedDriver

TOLERANCE = 1e-5
OPTIONS = LoadOptions(max_sequences=4, max_context=64)
LAYOUTS = {"paged": ", block_size: 4", "slots": "", "ring": ", max_chunk: 4"}


def reference(model: Compiled, program: Program | None = None) -> Any:
    """The reference executor: its states start full of NaN."""
    return load_executor_module("reference").ReferenceExecutor(program or model.program, model.tensors(), OPTIONS)


def error(model: Compiled, executor: Any, shift: int = 0) -> float:
    """Worst relative error of an executor over the model's sequences."""
    return worst(RaggedDriver(executor, shift=shift).logits(model.sequences, list(PROMPTS)), model.expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reference_matches_eager(architecture: str, layout: str) -> None:
    model = compiled(architecture, "reference", layout, LAYOUTS[layout])
    assert error(model, reference(model)) <= TOLERANCE


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


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_attention_is_caught(what: str) -> None:
    architecture, change = WRONG[what]
    model = compiled(architecture, "reference", "paged", LAYOUTS["paged"])
    assert error(model, reference(model, mutated(model.program, "llmopt.cached_attention", change))) > 10 * TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_shifted_position_is_caught(architecture: str) -> None:
    model = compiled(architecture, "reference", "paged", LAYOUTS["paged"])
    assert error(model, reference(model), shift=1) > 10 * TOLERANCE
