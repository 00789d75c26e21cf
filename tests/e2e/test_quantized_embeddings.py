"""Artifacts whose embedding table and LM head are quantized: onnxruntime computes what the reference does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmopt.artifact import Artifact
from llmopt.compiler import CompileOptions, compile_checkpoint
from llmopt.recipe import parse_recipe
from llmopt.runtime.executors import load_executor
from llmopt.target import LoadOptions
from tests.targets.ragged import RaggedDriver

RECIPE = """
target: {target}
max_context: 64
passes:
  - quantize_weights: {{bits: 4, group_size: 32, embeddings: true, include: ["model.embed_tokens"]}}
  - quantize_weights: {{bits: 8, lm_head: true}}
  - rewrite_kv_cache: {{layout: slots}}
  - prune_logits
"""
TOLERANCE = 1e-5


def logits(model: Path, target: str, folder: Path) -> tuple[Artifact, np.ndarray]:
    """The artifact and its logits of a short sequence."""
    compile_checkpoint(model, parse_recipe(RECIPE.format(target=target)), folder / target, CompileOptions())
    artifact = Artifact.open(folder / target)
    executor = load_executor(artifact, LoadOptions(max_sequences=2, max_context=32))
    try:
        return artifact, RaggedDriver(executor).logits([np.arange(40, 60)], [6])[0]
    finally:
        executor.close()


@pytest.mark.slow
def test_onnxruntime_equals_the_reference(embedded_model: Path, tmp_path: Path) -> None:
    exact, found = (logits(embedded_model, target, tmp_path) for target in ("reference", "onnxruntime"))
    assert np.abs(found[1] - exact[1]).max() <= TOLERANCE * np.abs(exact[1]).max()
    for artifact, _ in (exact, found):
        ops = [call.op for call in artifact.program.functions[artifact.program.entry_points["extend"]].calls]
        assert ops.count("llmopt.embedding_q") == 1
        assert "aten.linear" not in ops
    assert found[0].manifest.weights.bytes < exact[0].manifest.weights.bytes
