"""Models with keys and values as codes on the cuda target: logits like the reference's, the recipe, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmopt.artifact import Artifact, WeightsPlan
from llmopt.errors import TargetError
from llmopt.ir.ops.rounding import LIMITS
from llmopt.ir.weights import Constant
from llmopt.lower.readers import Reader
from llmopt.recipe import load_recipe
from targets.cuda.kernels._common import SM_COUNT
from targets.cuda.options import CudaOptions
from targets.cuda.select import discover
from tests.targets.cuda.fake_builds import compile_without_compiler
from tests.targets.cuda.models import Model, interpreted, model, reference
from tests.targets.cuda.test_cuda_architectures import few_logits
from tests.targets.cuda.test_cuda_plan import TOLERANCE
from tests.targets.models import worst

EMBEDDED = Path(__file__).parents[3] / "models" / "classics-2m"
OPTIONS = CudaOptions(decode_buckets=(4,), extend_buckets=(16,), extend_sequences=(4,))
RECIPE = load_recipe("bf16-kv8-cuda").text
SMALL = "{archs: [%d], decode_buckets: [1, 2], extend_buckets: [16], extend_sequences: [1]}"
CALIBRATED = "calibration: {tokens: 64, window: 16}\n"


def coded(architecture: str, format: str, largest: float = 4.0) -> Model:
    """A model whose heads keep numbers up to ``largest``."""
    text = RECIPE.replace("format: fp8_e4m3", f"format: {format}\n    scales: unit")
    found = model(architecture, text=text)
    scales = {name: reader for name, reader in found.weights.items() if name.endswith(("k_scale", "v_scale"))}
    assert scales
    fitting = {
        name: Reader(Constant(torch.full(reader.weight.shape, largest / LIMITS[format])), reader.type)
        for name, reader in scales.items()
    }
    return replace(found, weights={**found.weights, **fitting})


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "format"), [("qwen3", "fp8_e4m3"), ("llama-tied", "int8")])
def test_a_model_computes_what_the_reference_computes(
    architecture: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SM_COUNT, 90, 8)
    found = coded(architecture, format)
    vocab_size = found.program.vocab_size
    expected = few_logits(reference(found), vocab_size)
    assert worst(few_logits(interpreted(found, discover(), OPTIONS), vocab_size), expected) <= TOLERANCE
    wrong = coded(architecture, format, largest=4.0 / 64)
    assert worst(few_logits(reference(wrong), vocab_size), expected) > TOLERANCE


@pytest.mark.slow
def test_the_recipe_compiles_the_embedded_model(tmp_path: Path) -> None:
    text = CALIBRATED + RECIPE.replace("target_options: {}", f"target_options: {SMALL % 90}")
    artifact = Artifact.open(compile_without_compiler(EMBEDDED, tmp_path / "made", WeightsPlan("embedded"), text))
    states = [s for group in artifact.program.states.groups for s in group.states]
    assert {s.dtype for s in states} == {"float8_e4m3fn"}
    store = artifact.weight_store()
    scales = [store.get(s.scales) for s in states if s.scales is not None]
    assert len(scales) == len(states)
    assert all(scale.shape == (states[0].heads,) and (scale > 0).all() for scale in scales)
    assert not all((scale == 1).all() for scale in scales), "calibrated"
    assert artifact.manifest.accuracy["baseline"]["kl_mean"] > 0
    assert artifact.manifest.notes["proven"]["sm_90"] == "run on NVIDIA H200"
    for bucket, calls in artifact.manifest.notes["choices"]["sm_90"].items():
        op = "cuda.attention" if bucket.startswith("decode") else "llmopt.cached_attention"
        assert {c["kernel"] for c in calls[op]} == {"attention"}
        assert all("float8_e4m3fn states" in c["reason"] for c in calls[op])


@pytest.mark.slow
def test_an_older_gpu_is_refused_fp8(tmp_path: Path) -> None:
    text = RECIPE.replace("target_options: {}", f"target_options: {SMALL % 80}").replace(
        "format: fp8_e4m3", "scales: unit"
    )
    with pytest.raises(TargetError, match="sm_80 does not convert to FP8"):
        compile_without_compiler(EMBEDDED, tmp_path / "made", WeightsPlan("random", 7), text)
    text = text.replace("scales: unit", "format: int8\n    scales: unit")
    compile_without_compiler(EMBEDDED, tmp_path / "made", WeightsPlan("random", 7), text)
