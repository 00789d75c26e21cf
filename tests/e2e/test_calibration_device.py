"""Builds calibrated and proved on another device: everything that belongs there is there, and nothing else changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from llmopt.calibration.moments import measure
from llmopt.compiler import CompileOptions, compile_checkpoint
from llmopt.ir.samples import CPU
from llmopt.recipe import CalibrationOptions, parse_recipe
from tests.architectures import make_checkpoint
from tests.elsewhere import DEVICE, Elsewhere

RECIPE = """
target: reference
passes: [fuse_qkv, fuse_gate_up, fuse_gated_activation, {passes}, rewrite_kv_cache: {{layout: paged}}, prune_logits]
"""
CASES = {
    "gptq": ("llama", "choose_precision: {kl: 0.5, group_sizes: [32], windows: 1}, gptq: {static_groups: false}"),
    "awq": (
        "llama",
        "awq: {group_size: 32, include: ['*.0.*']}, quantize_weights: {bits: 4, group_size: 32, embeddings: true}",
    ),
    "smoothquant": ("llama", "smoothquant, quantize_weights, quantize_activations: {scale: tensor}, quantize_kv"),
    "experts": ("mixtral", "awq: {group_size: 32, clip: false, experts: true}, gptq: {group_size: 32, experts: true}"),
}


def build(checkpoint: Path, passes: str, output: Path, device: torch.device) -> dict[str, bytes]:
    """The artifact's files; the model writes the text."""
    samples = CalibrationOptions(tokens=32, window=16)
    options = CompileOptions(max_context=32, calibration=samples, sensitivity=True, device=device)
    compile_checkpoint(checkpoint, parse_recipe(RECIPE.format(passes=passes)), output, options)
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", CASES)
def test_the_same_build_elsewhere(kind: str, embedded_model: Path, tmp_path: Path) -> None:
    architecture, passes = CASES[kind]
    checkpoint = make_checkpoint(architecture, tmp_path / architecture)
    shutil.copy(embedded_model / "tokenizer.json", checkpoint)
    expected = build(checkpoint, passes, tmp_path / "a", CPU)
    with Elsewhere() as there:
        assert build(checkpoint, passes, tmp_path / "a", DEVICE) == expected
    assert there.calls["mm"] > 50


def test_operands_on_two_devices_are_noticed() -> None:
    with Elsewhere():
        rows = torch.ones(2, 4, device=DEVICE)
        assert measure([rows], 4, DEVICE).gram.device == DEVICE
        with pytest.raises(AssertionError, match="mixes devices"):
            measure([rows], 4, DEVICE).gram @ torch.ones(4, 4)
