"""Damaged or unsupported quantized checkpoints: one line that names the tensor and the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.errors import CheckpointError, LlmoptError, UnsupportedModelError
from llmopt.frontend import capture, load_checkpoint
from tests.frontend import packers
from tests.frontend.quantized import CASES, plain_model

LAYER = "model.layers.0.self_attn.q_proj"
Tensors = packers.Tensors


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The quantized checkpoint of a case, made once."""
    root = tmp_path_factory.mktemp("bad")
    plain = plain_model(root / "plain")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = root / name
            case = CASES[name]
            packers.write(plain, made[name], root / "values", case.pack, case.config)
        return made[name]

    return make


def damaged(source: Path, to: Path, change: Callable[[Tensors], None], **config: Any) -> Path:
    """A copy with changed tensors and options."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    to.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / "model.safetensors")
    whole = json.loads((source / "config.json").read_text())
    whole["quantization_config"] |= config
    (to / "config.json").write_text(json.dumps(whole))
    return to


def read_everything(path: Path) -> None:
    """Capture, then read every weight, as a build does."""
    for weight in capture(load_checkpoint(path), torch.float32).module.weights.values():
        for _ in weight.chunks(1 << 16):
            pass


def dropped(leaf: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(LAYER + leaf)


def changed(leaf: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[LAYER + leaf] = edit(tensors[LAYER + leaf].clone())

    return change


def at_one_place(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return edit


def halved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[: tensor.shape[0] // 2]


DAMAGED = {
    "gptq, no scales": ("gptq", dropped(".scales"), rf"{LAYER}.scales is missing"),
    "gptq, no zeros": ("gptq", dropped(".qzeros"), rf"{LAYER}.qzeros is missing"),
    "gptq, no g_idx": ("gptq-act-order", dropped(".g_idx"), rf"{LAYER}.g_idx is missing"),
    "gptq, zero scale": (
        "gptq",
        changed(".scales", at_one_place(0)),
        rf"safetensors: tensor {LAYER}.scales holds scales of zero",
    ),
    "gptq, NaN scale": ("gptq", changed(".scales", at_one_place(float("nan"))), rf"tensor {LAYER}.scales holds NaN"),
    "gptq, half the words": (
        "gptq",
        changed(".qweight", halved),
        rf"tensor {LAYER}.scales is \[6, 192\], .* \[3, 192\]",
    ),
    "gptq, words of int64": ("gptq", changed(".qweight", lambda t: t.long()), rf"{LAYER}.qweight is int64, .* int32"),
    "gptq, group out of range": (
        "gptq-act-order",
        changed(".g_idx", at_one_place(6)),
        r"g_idx names groups outside 0\.\.5",
    ),
    "awq, no zeros": ("awq", dropped(".qzeros"), rf"{LAYER}.qzeros is missing"),
    "awq, half the words": ("awq", changed(".qweight", halved), rf"{LAYER}.scales is \[6, 192\]"),
    "awq, zero scale": ("awq", changed(".scales", at_one_place(0)), "holds scales of zero"),
    "w4a16, no scales": ("w4a16", dropped(".weight_scale"), rf"{LAYER}.weight_scale is missing"),
    "w4a16, no shape": ("w4a16", dropped(".weight_shape"), rf"{LAYER}.weight_shape is missing"),
    "w4a16, half the words": ("w4a16", changed(".weight_packed", halved), rf"{LAYER}.weight_packed is \[96, 24\]"),
    "w4a16, no zeros": ("w4a16-zeros", dropped(".weight_zero_point"), rf"{LAYER}.weight_zero_point is missing"),
    "int8, no scales": ("w8a8-int8", dropped(".weight_scale"), rf"tensor {LAYER}.weight is int8 and has no scales"),
    "int8, zero scale": ("w8a8-int8", changed(".weight_scale", at_one_place(0)), "weight_scale holds scales of zero"),
    "fp8, no scales": (
        "fp8-blocks",
        dropped(".weight_scale_inv"),
        rf"{LAYER}.weight is float8_e4m3fn and has no scales",
    ),
    "fp8, half the scales": (
        "fp8-blocks",
        changed(".weight_scale_inv", halved),
        rf"{LAYER}.weight_scale_inv is \[1, 2\], .*\[2, 2\]",
    ),
    "fp8, NaN code": (
        "fp8-blocks",
        changed(".weight", lambda t: at_one_place(127)(t.view(torch.uint8)).view(t.dtype)),
        rf"{LAYER}.weight holds NaN",
    ),
    "fp8, infinite scale": (
        "fp8-blocks",
        changed(".weight_scale_inv", at_one_place(float("inf"))),
        r"weight_scale_inv holds NaN or inf",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged(what: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    name, change, message = DAMAGED[what]
    path = damaged(written(name), tmp_path / "bad", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_everything(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq, 5 bits": ("gptq", {"bits": 5}, r"bits 5 is not supported \(known: 2, 3, 4, 8\)"),
    "gptq, no bits": ("gptq", {"bits": None}, "bits is None, an integer is needed"),
    "gptq, marlin": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
    "gptq, group size": ("gptq", {"group_size": 64}, r"\.scales is \[10, 192\], its layer asks for \[5, 192\]"),
    "gptq, wrong bits": ("gptq", {"bits": 8}, r"\.scales is \[10, 192\], its layer asks for \[5, 192\]"),
    "awq, 8 bits": ("awq", {"bits": 8}, "bits 8 is not supported"),
    "awq, gemv": ("awq", {"version": "gemv"}, "version 'gemv' is not supported"),
    "sparse": ("w4a16", {"format": "marlin-24"}, "format 'marlin-24' is not supported"),
    "no groups": ("w4a16", {"config_groups": None}, "config_groups is missing"),
    "other method": ("awq", {"quant_method": "awqq"}, "quantized by 'awqq' are not read"),
    "no method": ("awq", {"quant_method": None}, "quantized by None are not read"),
    "another method": ("fp8-blocks", {"quant_method": "awq", "bits": 4}, "no tensor ends in .qweight"),
    "block size": (
        "fp8-blocks",
        {"weight_block_size": [64, 64]},
        r"weight_scale_inv is \[2, 3\], its layer asks for \[3, 5\]",
    ),
    "no block size": ("fp8-blocks", {"weight_block_size": 128}, "weight_block_size is 128, two integers are needed"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options(what: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    name, options, message = OPTIONS[what]
    path = damaged(written(name), tmp_path / "bad", lambda _: None, **options)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message) as caught:
        read_everything(path)
    assert str(path) in str(caught.value)


def test_a_quantized_embedding_is_refused(written: Callable[[str], Path], tmp_path: Path) -> None:
    """Only linears and experts run on codes; nothing else is turned into values unasked."""

    def move(tensors: Tensors) -> None:
        del tensors["model.embed_tokens.weight"]
        found = packers.gptq(packers.rounded(torch.randn(96, 192), 4, 32, False), 4, 1)
        tensors.update({"model.embed_tokens" + leaf: tensor for leaf, tensor in found.items()})

    path = damaged(written("gptq"), tmp_path / "bad", move)
    with pytest.raises(LlmoptError, match=r"embed_tokens.weight is quantized, .*dequantize: \[PATTERN\]"):
        read_everything(path)
    capture(load_checkpoint(path), torch.float32, None, ("*embed_tokens*",))
