"""Models whose linears multiply codes by codes: recipes, logits against the reference's, stored checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmopt.artifact import Artifact, WeightsPlan
from llmopt.ir.weights import Constant
from llmopt.launch import LaunchPlan, plan_file
from llmopt.lower.readers import Reader
from llmopt.recipe import load_recipe
from llmopt.report.sections import crossover_rows
from targets.cuda.build import plan_arch
from targets.cuda.kernels._common import SM_COUNT
from targets.cuda.options import CudaOptions
from targets.cuda.pack import stored
from targets.cuda.select import discover
from tests.e2e.test_calibrated_build import TEXT
from tests.frontend.quantized import CASES, make_pair, plain_model
from tests.targets.cuda.fake_builds import compile_without_compiler
from tests.targets.cuda.models import Model, interpreted, lowered, model, reference
from tests.targets.cuda.test_cuda_architectures import logits
from tests.targets.cuda.test_cuda_plan import TOLERANCE
from tests.targets.models import worst

EMBEDDED = Path(__file__).parents[3] / "models" / "classics-2m"
OPTIONS = CudaOptions(decode_buckets=(1, 4), extend_buckets=(16,), extend_sequences=(4,))
WEIGHTS, ACTIVATIONS = ("quantize_weights", {"format": "fp8_e4m3"}), ("quantize_activations", {"format": "fp8_e4m3"})


def recipe(*quantizers: tuple[str, dict[str, Any]]) -> str:
    """The recipe fp8-cuda with other quantizers, in float16: the interpreter rounds to it as a GPU does, and truncates
    to bfloat16, which moves codes."""
    document = yaml.safe_load(load_recipe("fp8-cuda").text)
    names = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in document["passes"]]
    first = names.index("quantize_weights")
    assert names[first : first + 2] == ["quantize_weights", "quantize_activations"]
    document["passes"][first : first + 2] = [{name: options} for name, options in quantizers]
    return yaml.safe_dump({**document, "dtype": "float16"}, sort_keys=False)


ROUND_INT8 = ("quantize_activations", {"format": "int8"})
FP8, STORED = recipe(WEIGHTS, ACTIVATIONS), recipe(ACTIVATIONS)
INT8, STORED_INT8 = recipe(("quantize_weights", {"bits": 8}), ROUND_INT8), recipe(ROUND_INT8)
ZEROS = recipe(("quantize_weights", {"bits": 8, "symmetric": False}), ROUND_INT8)
CODED = {"cuda.linear_8", "cuda.round", "cuda.norm_round"}


def error(found: Model, good: Model) -> float:
    """Largest error of the kernels over a model's weights against the reference over the good ones."""
    vocab_size = good.program.vocab_size
    return worst(logits(interpreted(found, discover(), OPTIONS), vocab_size), logits(reference(good), vocab_size))


def ops(found: Model, arch: int = 90) -> set[str]:
    """What kernels serve in any bucket."""
    plan = plan_arch(stored(found.program), arch, OPTIONS, discover(), {})
    return {call.op for bucket in plan.buckets for call, _ in bucket.choices}


@pytest.mark.slow
@pytest.mark.parametrize("text", [FP8, INT8], ids=["fp8", "int8"])
def test_a_model_of_codes_computes_what_the_reference_computes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SM_COUNT, 90, 8)
    found = model("llama", text=text)
    assert ops(found) >= CODED
    assert error(found, found) <= TOLERANCE


def test_zero_points_multiply_the_rounded_numbers() -> None:
    found = ops(model("llama", text=ZEROS))
    assert "llmopt.round_activations" in found
    assert not CODED & found


@pytest.mark.slow
def test_a_scale_of_another_channel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SM_COUNT, 90, 8)
    found = model("llama", text=FP8)
    name = next(name for name in found.weights if name.endswith(".scales"))
    wrong = Reader(Constant(found.weights[name].weight.tensor().roll(1, 0)), found.weights[name].type)
    assert error(replace(found, weights={**found.weights, name: wrong}), found) > TOLERANCE


def test_an_older_gpu_multiplies_the_rounded_numbers() -> None:
    found = ops(model("llama", text=FP8), 80)
    assert {"llmopt.round_activations"} <= found
    assert not CODED & found
    assert ops(model("llama", text=INT8), 80) >= CODED


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
def test_stored_blocks_run_as_they_are(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SM_COUNT, 90, 8)
    found = lowered(make_pair(CASES["fp8-blocks"], plain, tmp_path).path, STORED)
    assert ops(found) >= CODED
    assert error(found, found) <= TOLERANCE


@pytest.mark.parametrize("name", ["w8a8-fp8-channel", "w8a8-fp8-tensor", "fp8-blocks", "w8a8-int8"])
def test_every_stored_format_is_served(name: str, plain: Path, tmp_path: Path) -> None:
    """With rounded activations, and weight-only."""
    pair = make_pair(CASES[name], plain, tmp_path)
    found = lowered(pair.path, STORED_INT8 if "int8" in name else STORED)
    codes = {n: w.weight.tensor() for n, w in found.weights.items() if n.endswith(".codes")}
    assert ops(found) >= CODED
    only = lowered(pair.path, recipe())
    assert "llmopt.linear_q" in ops(only)
    assert not CODED & ops(only)
    for n, tensor in codes.items():
        again = only.weights[n].weight.tensor()
        assert torch.equal(tensor.view(torch.uint8), again.view(torch.uint8)), n


@pytest.mark.parametrize(("name", "kind"), [("fp8-cuda", "random"), ("w8a8-cuda", "embedded")])
def test_the_recipes_compile_the_embedded_model(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    samples = f"calibration: {{text: {tmp_path / 'text.txt'}, tokens: 256, window: 64}}\n"
    text = load_recipe(name).text + (samples if name == "w8a8-cuda" else "")
    made = compile_without_compiler(EMBEDDED, tmp_path / "made", WeightsPlan(kind, 7), text)  # type: ignore[arg-type]
    artifact = Artifact.open(made)
    plan, store = LaunchPlan.from_json(artifact.file(plan_file(90)).read_text()), artifact.weight_store()
    expected = "float8_e4m3fn" if name == "fp8-cuda" else "int8"
    for key, weight in plan.stored(artifact.program).weights.items():
        assert (store.dtype(key), store.get(key).shape) == (weight.type.dtype, weight.type.shape), key
        assert weight.type.dtype == expected or not key.endswith(".codes")
    head = "lm_head.weight" if "lm_head.weight" in store.names() else "model.embed_tokens.weight"
    assert store.dtype(head) == "bfloat16"
    choices = artifact.manifest.notes["choices"]["sm_90"]["decode 1x1"]["cuda.linear_8"]
    assert {choice["kernel"] for choice in choices} == {"gemv_w8a8"}
    assert {row[-1] for row in crossover_rows(artifact.manifest)} == {"not measured"}
