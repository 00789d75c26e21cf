"""Bad input to builds that quantize, through the command line: one line, the documented exit code, nothing left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.test_bad_input import checkpoint, edit_tensor, fails  # noqa: F401  (a fixture)
from tests.frontend import packers
from tests.frontend.quantized import CASES, plain_model
from tests.frontend.test_quantized_bad import LAYER, at_one_place, changed, damaged, halved

TEXT = " ".join(f"On the {i}th day the captain wrote of wind, water and the price of salt." for i in range(300))
RECIPE = "target: {target}\ndtype: {dtype}\ncalibration: {{tokens: 64, window: 32}}\npasses:\n  - {passes}\n"


def refused(
    model: Path, folder: Path, passes: str, code: int, capsys: Any, *words: str, target: str = "reference"
) -> None:
    """The recipe's build of a model fails so, and leaves no artifact."""
    dtype = "bfloat16" if target == "cuda" else "float32"
    (folder / "r.yaml").write_text(RECIPE.format(target=target, dtype=dtype, passes=passes))
    arguments = ["compile", model, "-r", folder / "r.yaml", "-o", folder / "out"]
    if (model / "tokenizer.json").exists():
        (folder / "text.txt").write_text(TEXT)
        arguments += ["--calibration", folder / "text.txt"]
    fails([str(a) for a in arguments], code, capsys, *words)
    assert not (folder / "out").exists()


UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("passes", ["gptq: {bits: 4, group_size: 32}", "awq: {group_size: 32}", "smoothquant"])
def test_activations_that_overflow_name_the_layer(
    passes: str,
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_tensor(checkpoint, UP, lambda t: (t.astype("float32") * 0 + 3e38).astype(t.dtype))
    refused(checkpoint, tmp_path, passes, 6, capsys, DOWN, "the activations hold NaN or infinity")


CHOICES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "bits of onnxruntime": ("onnxruntime", "quantize_weights: {bits: 9}", ("onnxruntime has no 9-bit weights",)),
    "bits of cuda": ("cuda", "gptq: {bits: 3}", ("cuda has no 3-bit weights", "4, 8")),
    "bits to choose from": ("cuda", "choose_precision: {size: 1GB, bits: [4, 5]}", ("cuda has no 5-bit weights",)),
    "bits of a layer": ("cuda", "set_precision: {bits: 2}", ("cuda has no 2-bit weights",)),
    "format": ("onnxruntime", "quantize_weights: {format: fp8_e4m3}", ("onnxruntime has no fp8_e4m3 weights",)),
    "activations": ("onnxruntime", "quantize_activations", ("does not round activations to int8",)),
    "groups of gptq": ("reference", "gptq: {group_size: 128}", ("group_size 128 does not divide", "layers.0")),
    "groups of awq": ("reference", "awq: {group_size: 128}", ("group_size 128 does not divide", "layers.0")),
    "groups of a layer": (
        "reference",
        'set_precision: {bits: 4, group_size: 128, include: ["*.0.*.q_proj"]}',
        ("group_size 128 does not divide", "layers.0.self_attn.q_proj"),
    ),
    "groups to choose from": (
        "reference",
        "choose_precision: {size: 1GB, group_sizes: [128]}",
        ("none of the group sizes [128] divides", "layers.0"),
    ),
    "a budget": (
        "reference",
        "choose_precision: {size: 1kB, group_sizes: [32], windows: 1}",
        ("size 1kB cannot be met",),
    ),
}


@pytest.mark.parametrize("what", CHOICES)
def test_what_a_target_or_a_layer_lacks(
    what: str, embedded_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, passes, words = CHOICES[what]
    refused(embedded_model, tmp_path, passes, 6, capsys, *words, target=target)


DAMAGE: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a scale of zero": ("gptq", changed(".scales", at_one_place(0)), f"{LAYER}.scales holds scales of zero"),
    "half the packed words": ("w4a16", changed(".weight_packed", halved), f"{LAYER}.weight_packed is [96, 24]"),
    "packed words of another type": ("awq", changed(".qweight", lambda t: t.long()), f"{LAYER}.qweight is int64"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_packed_tensors(what: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, change, words = DAMAGE[what]
    packers.write(plain, tmp_path / "q", tmp_path / "values", CASES[name].pack, CASES[name].config)
    path = damaged(tmp_path / "q", tmp_path / "bad", change)
    refused(path, tmp_path, "rewrite_kv_cache: {layout: slots}", 4, capsys, words, "model.safetensors")
