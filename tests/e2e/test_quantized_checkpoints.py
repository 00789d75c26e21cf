"""Artifacts of checkpoints already quantized: logits of transformers on the values, errors in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmopt.artifact import Artifact
from llmopt.compiler import CompileOptions, compile_checkpoint
from llmopt.errors import ConfigError, PassError, TargetError
from llmopt.recipe import parse_recipe
from llmopt.runtime.executors import load_executor
from llmopt.target import LoadOptions
from tests.frontend.quantized import CASES, Pair, make_pair, plain_model
from tests.targets.ragged import RaggedDriver

RECIPE = """
target: {target}
dtype: {dtype}
max_context: 64
{more}
passes:
  - fuse_qkv: {{expect: {layers}}}
  - fuse_gate_up: {{expect: {layers}}}
  - fuse_gated_activation
  - fuse_add_norm
  - rewrite_kv_cache: {{layout: slots}}
  - prune_logits
"""
TOLERANCE = 1e-5
INTEGERS = ("gptq", "gptq-3-bit", "gptq-8-bit", "awq", "w4a16-zeros", "w8a8-int8", "w8a8-int8-zeros")
REFERENCE = ("gptq-act-order", "awq", "w8a8-fp8-tensor", "fp8-blocks")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("plain"))


def build(pair: Pair, target: str, dtype: str = "float32", more: str = "", layers: int = 1) -> Artifact:
    recipe = parse_recipe(RECIPE.format(target=target, dtype=dtype, more=more, layers=layers))
    output = pair.path.with_name(f"artifact-{target}")
    compile_checkpoint(pair.path, recipe, output, CompileOptions())
    return Artifact.open(output)


def error(artifact: Artifact, pair: Pair) -> float:
    executor = load_executor(artifact, LoadOptions(max_sequences=2, max_context=32))
    try:
        found = RaggedDriver(executor).logits([pair.ids[0].numpy()], [6])[0]
    finally:
        executor.close()
    expected = pair.expected[0].numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def ops(artifact: Artifact) -> list[str]:
    return [call.op for call in artifact.program.functions[artifact.program.entry_points["extend"]].calls]


@pytest.mark.parametrize("name", REFERENCE)
def test_reference(name: str, plain: Path, tmp_path: Path) -> None:
    pair = make_pair(CASES[name], plain, tmp_path)
    artifact = build(pair, "reference")
    assert ops(artifact).count("llmopt.linear_q") == 4
    assert error(artifact, pair) <= TOLERANCE


@pytest.mark.parametrize("name", INTEGERS)
def test_onnxruntime(name: str, plain: Path, tmp_path: Path) -> None:
    pair = make_pair(CASES[name], plain, tmp_path)
    artifact = build(pair, "onnxruntime")
    assert ops(artifact).count("llmopt.linear_q") == 4
    assert error(artifact, pair) <= TOLERANCE


def test_what_a_target_lacks_is_refused_or_dequantized(plain: Path, tmp_path: Path) -> None:
    pair = make_pair(CASES["fp8-blocks"], plain, tmp_path)
    with pytest.raises(TargetError, match=r"does not run fp8_e4m3 weights of 8 bits \(dequantize: "):
        build(pair, "onnxruntime")
    assert not (tmp_path / "artifact-onnxruntime").exists()
    artifact = build(pair, "onnxruntime", more="dequantize: ['*_proj.weight']")
    assert "llmopt.linear_q" not in ops(artifact)
    assert error(artifact, pair) <= TOLERANCE


def test_activation_order_needs_a_target_that_reads_it(plain: Path, tmp_path: Path) -> None:
    pair = make_pair(CASES["gptq-act-order"], plain, tmp_path)
    with pytest.raises(TargetError, match=r"g_idx.* dequantize"):
        build(pair, "onnxruntime")
    assert not (tmp_path / "artifact-onnxruntime").exists()


def test_a_pattern_without_a_match(plain: Path, tmp_path: Path) -> None:
    pair = make_pair(CASES["awq"], plain, tmp_path)
    with pytest.raises(ConfigError, match=r"pattern '\*\.q_prj' matches no quantized tensor \(there are 7 layers"):
        build(pair, "reference", more="dequantize: ['*.q_prj']")


def test_one_layer_dequantized(plain: Path, tmp_path: Path) -> None:
    """The others keep their codes."""
    pair = make_pair(CASES["awq"], plain, tmp_path)
    artifact = build(pair, "onnxruntime", more="dequantize: ['*.down_proj']")
    assert ops(artifact).count("llmopt.linear_q") == 3
    assert error(artifact, pair) <= TOLERANCE


def test_codes_are_not_rounded_again(plain: Path, tmp_path: Path) -> None:
    pair = make_pair(CASES["awq"], plain, tmp_path)
    recipe = parse_recipe("{target: reference, passes: [fuse_qkv, quantize_weights]}")
    with pytest.raises(PassError, match="no layer is left to quantize"):
        compile_checkpoint(pair.path, recipe, tmp_path / "out")


def test_activations_are_rounded_by_the_recipe(plain: Path, tmp_path: Path) -> None:
    """W8A8: quantize_activations finds the linears over stored codes; its error is that of 8 bits."""
    pair = make_pair(CASES["w8a8-int8"], plain, tmp_path)
    output = tmp_path / "artifact"
    text = RECIPE.format(target="reference", dtype="float32", more="", layers=1)
    rounded = text.replace("  - rewrite_kv_cache", "  - quantize_activations: {expect: 4}\n  - rewrite_kv_cache")
    compile_checkpoint(pair.path, parse_recipe(rounded), output)
    assert 1e-4 < error(Artifact.open(output), pair) < 0.05
