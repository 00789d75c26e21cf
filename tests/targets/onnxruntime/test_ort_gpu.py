"""The CUDA provider (onnxruntime-gpu in place of onnxruntime): logits, state operations, the gate on load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from llmopt.artifact import Artifact
from llmopt.compiler import compile_checkpoint
from llmopt.errors import ExecutorError
from llmopt.recipe import parse_recipe
from llmopt.runtime.executors.onnxruntime import COPY_FILE, MODEL_FILE, OnnxruntimeExecutor, load
from llmopt.runtime.executors.onnxruntime_session import PROVIDERS
from llmopt.runtime.golden import check_golden
from tests.architectures import ARCHITECTURES
from tests.targets.models import Compiled, compiled
from tests.targets.onnxruntime.build import executor
from tests.targets.onnxruntime.test_ort_executor import OPERATIONS, PROGRAM, WEIGHTS, check_state_operation
from tests.targets.test_conformance import OPTIONS, TOLERANCE, WRONG, error, mutated

missing = "CUDAExecutionProvider" not in ort.get_available_providers()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing, reason="onnxruntime-gpu is not installed")]
CUDA = replace(OPTIONS, device="cuda")
EMBEDDED = Path("models/classics-2m")
SLACK = 2.0
"""float16 on the CPU provider has an error; this many times it is what another order of sums may cost."""


def on(device: str, model: Compiled, program: Any = None) -> Any:
    """The executor of a model in onnxruntime's own operators."""
    options = replace(OPTIONS, device=device)
    return executor(program or model.program, model.weights, options, native_kernels=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_matches_eager(architecture: str) -> None:
    model = compiled(architecture, "onnxruntime", "slots")
    assert error(model, on("cuda", model)) <= TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float16_is_as_near_as_on_the_cpu(architecture: str) -> None:
    model = compiled(architecture, "onnxruntime", "slots", dtype="float16")
    assert error(model, on("cuda", model)) <= SLACK * error(model, on("cpu", model))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_attention_is_caught(what: str, dtype: str) -> None:
    architecture, change = WRONG[what]
    model = compiled(architecture, "onnxruntime", "slots", dtype=dtype)
    wrong = on("cuda", model, mutated(model.program, "llmopt.cached_attention", change))
    assert error(model, wrong) > 5 * error(model, on("cpu", model))


@pytest.mark.parametrize("name", OPERATIONS)
def test_state_operations(name: str) -> None:
    check_state_operation(name, executor(PROGRAM, WEIGHTS, CUDA, native_kernels=False))


def artifact_of(recipe: str, dtype: str, folder: Path) -> Artifact:
    """The embedded model, compiled with a recipe of the repository's."""
    found = parse_recipe(Path(f"recipes/{recipe}.yaml").read_text().replace("dtype: float32", f"dtype: {dtype}"))
    options = {**found.target_options, "native_kernels": False}  # they serve the CPU alone, and want a compiler
    compile_checkpoint(EMBEDDED, replace(found, target_options=options), folder / "artifact")
    return Artifact.open(folder / "artifact")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("recipe", ["fp32-cpu", "int8-cpu", "int4-cpu"])
def test_artifacts_of_the_cpu_recipes_pass_the_gate(recipe: str, dtype: str, tmp_path: Path) -> None:
    runner = load(artifact_of(recipe, dtype, tmp_path), CUDA)
    assert runner.session.get_providers()[0] == PROVIDERS["cuda"]
    runner.close()


def test_the_gate_refuses_a_form_the_provider_computes_wrongly(tmp_path: Path) -> None:
    """GroupQueryAttention over float32 runs on the host there, where past and present are not one buffer."""
    artifact = artifact_of("fp32-cpu", "float32", tmp_path)
    model, copier = (artifact.file(name).read_bytes() for name in (MODEL_FILE, COPY_FILE))
    runner = OnnxruntimeExecutor(artifact.program, model, copier, artifact.weight_store(), CUDA)
    with pytest.raises(ExecutorError, match="golden tokens differ"):
        check_golden(runner, artifact.manifest.golden, dtype="float32")
