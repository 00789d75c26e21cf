"""Quantized checkpoints of every format: a random Llama written by the packers, with the logits of its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from llmopt.frontend import capture, load_checkpoint
from llmopt.ir.module import Module
from llmopt.ir.tolerance import row_error
from tests.architectures import VOCAB, base, make_checkpoint, make_model
from tests.frontend import packers
from tests.frontend.running import captured_logits, eager_model


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
    "w2a16": packed_case(2, 32, symmetric=False),
    "w8a8-int8": int8_case(True),
    "w8a8-int8-zeros": int8_case(False),
    "w8a8-fp8-channel": fp8_case(fp8_weights("channel"), ".weight_scale", lambda w: (1, w.shape[1])),
    "w8a8-fp8-tensor": fp8_case(fp8_weights("tensor"), ".weight_scale", lambda w: (w.shape[0], w.shape[1]), True),
    "w8a8-fp8-block": fp8_case(fp8_weights("block"), ".weight_scale", lambda w: (128, 128)),
    "fp8-blocks": fp8_case(BLOCKS, ".weight_scale_inv", lambda w: (128, 128)),
}
PERMUTED = {"gptq-act-order", "w4a16-act-order"}


def plain_model(path: Path) -> Path:
    """A random Llama whose widths no block of 128 divides."""
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = LlamaConfig(**base(num_hidden_layers=1, head_dim=64, **sizes))
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


def gpt_oss_pair(tmp_path: Path, spoil: Callable[[packers.Tensors], None] = lambda tensors: None) -> Pair:
    """A gpt-oss whose experts are packed, and the values; ``spoil`` changes the packed tensors."""
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
    spoil(packed)
    packers.save(packed, plain, tmp_path / "quantized", config)
    packers.save(values, plain, tmp_path / "values", None)
    return pair_of(tmp_path / "quantized", tmp_path / "values")
