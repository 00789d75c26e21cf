"""Checkpoints already quantized: the logits of transformers on the values, and each convention's wrong reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from llmopt.frontend import capture, load_checkpoint
from llmopt.frontend.quantized import awq, gptq, mxfp4, packing
from llmopt.ir.module import Module
from llmopt.ir.sites import EXPERTS_Q, LINEAR_Q
from llmopt.ir.tolerance import row_error, tolerance
from tests.architectures import VOCAB, base, make_checkpoint, make_model
from tests.frontend import packers
from tests.frontend.running import captured_logits, eager_model

LINEARS = 7
WRONG = 0.02
"""A wrong reading is off by more than this; rounding is off by 1e-6."""


def weights_of(bits: int, group: int, symmetric: bool = True, act_order: bool = False, **more: Any) -> dict[str, Any]:
    """compressed-tensors' description of weights."""
    strategy = "channel" if group < 0 else "group"
    found = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": symmetric}
    return found | {"actorder": "group" if act_order else None} | more


def compressed(weights: dict[str, Any], format: str) -> dict[str, Any]:
    """A compressed-tensors config of one group."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


@dataclass(frozen=True)
class Case:
    """How a format packs a layer, and its config."""

    pack: packers.Pack
    config: dict[str, Any]


def by_grid(
    tensors: Callable[[packers.Rounded], packers.Tensors],
    bits: int,
    group: int,
    symmetric: bool,
    shuffled: bool = False,
) -> packers.Pack:
    """Packs the rounded matrix. The same groups of columns for layers of one input, as their Hessian is one."""

    def pack(stem: str, weight: Tensor) -> tuple[packers.Tensors, Tensor]:
        width = weight.shape[1] if group < 0 else group
        found = packers.rounded(weight, bits, width, symmetric, len(stem.rpartition(".")[0]) if shuffled else None)
        return tensors(found), found.values()

    return pack


def gptq_case(bits: int = 4, group: int = 32, symmetric: bool = False, act: bool = False, version: int = 1) -> Case:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    return Case(by_grid(partial(packers.gptq, bits=bits, version=version), bits, group, symmetric, act), config)


def packed_case(bits: int, group: int, symmetric: bool = True, act: bool = False) -> Case:
    write = partial(packers.pack_quantized, bits=bits, symmetric=symmetric, act_order=act)
    config = compressed(weights_of(bits, group, symmetric, act), "pack-quantized")
    return Case(by_grid(write, bits, group, symmetric, act), config)


def int8_case(symmetric: bool) -> Case:
    config = compressed(weights_of(8, -1, symmetric), "int-quantized")
    return Case(by_grid(partial(packers.int8, symmetric=symmetric), 8, -1, symmetric), config)


def fp8_case(
    config: dict[str, Any], scale: str, block: Callable[[Tensor], tuple[int, int]], flat: bool = False
) -> Case:
    def pack(stem: str, weight: Tensor) -> tuple[packers.Tensors, Tensor]:
        codes, scales, values = packers.fp8(weight, block(weight))
        return {".weight": codes, scale: scales.flatten() if flat else scales}, values

    return Case(pack, config)


def fp8_weights(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "block_structure": [128, 128]}
    return compressed(weights, "float-quantized")


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
CASES = {
    "gptq": gptq_case(),
    "gptq-v2": gptq_case(version=2),
    "gptq-symmetric": gptq_case(symmetric=True),
    "gptq-act-order": gptq_case(act=True),
    "gptq-2-bit": gptq_case(bits=2),
    "gptq-3-bit": gptq_case(bits=3),
    "gptq-8-bit": gptq_case(bits=8, group=-1),
    "awq": Case(by_grid(packers.awq, 4, 32, False), {"quant_method": "awq", "bits": 4, "group_size": 32}),
    "w4a16": packed_case(4, 32),
    "w4a16-zeros": packed_case(4, 32, symmetric=False),
    "w4a16-act-order": packed_case(4, 32, act=True),
    "w8a16-channel": packed_case(8, -1),
    "w8a8-int8": int8_case(True),
    "w8a8-int8-zeros": int8_case(False),
    "w8a8-fp8-channel": fp8_case(fp8_weights("channel"), ".weight_scale", lambda w: (1, w.shape[1])),
    "w8a8-fp8-tensor": fp8_case(fp8_weights("tensor"), ".weight_scale", lambda w: (w.shape[0], w.shape[1]), True),
    "w8a8-fp8-block": fp8_case(fp8_weights("block"), ".weight_scale", lambda w: (128, 128)),
    "fp8-blocks": fp8_case(BLOCKS, ".weight_scale_inv", lambda w: (128, 128)),
}
PERMUTED = {"gptq-act-order", "w4a16-act-order"}


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose widths no block of 128 divides."""
    path = tmp_path_factory.mktemp("plain")
    config = LlamaConfig(**base(num_hidden_layers=1, hidden_size=192, intermediate_size=320, head_dim=48))
    make_model(config).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Pair:
    """A quantized checkpoint and transformers' logits on its values."""

    path: Path
    ids: Tensor
    expected: Tensor

    def module(self, **options: Any) -> Module:
        return capture(load_checkpoint(self.path), torch.float32, **options).module

    def error(self) -> float:
        return row_error(captured_logits(self.module(), self.ids), self.expected)


@torch.no_grad()
def pair_of(quantized: Path, dequantized: Path) -> Pair:
    ids = torch.randint(3, VOCAB, (1, 11), generator=torch.Generator().manual_seed(1))
    return Pair(quantized, ids, eager_model(dequantized)(ids, use_cache=False).logits)


def make_pair(case: Case, plain: Path, folder: Path) -> Pair:
    packers.write(plain, folder / "quantized", folder / "values", case.pack, case.config)
    return pair_of(folder / "quantized", folder / "values")


def count(module: Module, op: Any) -> int:
    return len(module.functions["step"].graph.find_nodes(op="call_function", target=op))


LIMIT = tolerance(torch.float32, 320, 20)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_values(name: str, plain: Path, tmp_path: Path) -> None:
    pair = make_pair(CASES[name], plain, tmp_path)
    module = pair.module()
    assert count(module, LINEAR_Q) == LINEARS
    assert row_error(captured_logits(module, pair.ids), pair.expected) <= LIMIT
    assert any(n.endswith(".g_idx") for n in module.weights) == (name in PERMUTED)
    values = pair.module(dequantize=("*",))
    assert count(values, LINEAR_Q) == 0
    assert row_error(captured_logits(values, pair.ids), pair.expected) <= LIMIT
    check_pieces(module)
    check_pieces(values)


def check_pieces(module: Module) -> None:
    """Any rows of codes, scales, zeros and values are those of the whole."""
    for name, weight in module.weights.items():
        if "o_proj" in name or "down_proj" in name:
            whole, rows = weight.tensor().float(), weight.rows
            for start, stop in ((0, 1), (rows // 3, rows - 1), (rows // 2, rows)):
                assert torch.equal(weight.read(start, stop).float(), whole[start:stop]), name


def test_gpt_oss(tmp_path: Path) -> None:
    plain = make_checkpoint("gpt_oss", tmp_path / "plain")
    tensors = packers.load_file(plain / "model.safetensors")
    packed, values = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, exponents, found = packers.mxfp4(weight.transpose(1, 2))
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
            values[name] = found.transpose(1, 2)
            del packed[name]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    packers.save(packed, plain, tmp_path / "quantized", config)
    packers.save(values, plain, tmp_path / "values", None)
    pair = pair_of(tmp_path / "quantized", tmp_path / "values")
    assert count(pair.module(), EXPERTS_Q) == 2
    assert pair.error() <= LIMIT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mxfp4, "nibbles", lambda b: torch.stack((b >> 4, b & 15), dim=-1).flatten(-3))
        assert pair.error() > WRONG


def wrong_lowest(patch: pytest.MonkeyPatch) -> None:
    """Version 1 read as version 2 and the other way round."""
    patch.setattr(gptq, "VERSIONS", ("gptq_v2", "gptq"))
    original = gptq.Reader.__init__

    def init(self: Any, options: Any) -> None:
        original(self, options)
        self.lowest = 1 - self.lowest

    patch.setattr(gptq.Reader, "__init__", init)


WRONG_READINGS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "v1 as v2": ("gptq", wrong_lowest),
    "v2 as v1": ("gptq-v2", wrong_lowest),
    "no g_idx": ("gptq-act-order", lambda p: p.setattr(gptq.Reader, "_order", lambda *_: None)),
    "awq in order": ("awq", lambda p: p.setattr(awq, "NIBBLES", tuple(range(8)))),
    "awq backwards": ("awq", lambda p: p.setattr(awq, "NIBBLES", (0, 2, 4, 6, 1, 3, 5, 7))),
    "scales divide": (
        "fp8-blocks",
        lambda p: p.setattr(packing.Scales, "_stored", lambda self, a, b: 1 / self.source.read(a, b)),
    ),
}


@pytest.mark.parametrize("reading", WRONG_READINGS)
def test_a_wrong_reading_is_seen(reading: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, spoil = WRONG_READINGS[reading]
    pair = make_pair(CASES[name], plain, tmp_path)
    assert pair.error() <= LIMIT
    spoil(monkeypatch)
    assert pair.error() > WRONG
