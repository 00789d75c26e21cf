"""Checkpoints already quantized: the logits of transformers on the values, and each convention's wrong reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt.errors import CheckpointError, UnsupportedModelError
from llmopt.frontend import capture, load_checkpoint
from llmopt.frontend.quantized import awq, gptq, mxfp4, packing
from llmopt.ir.module import Module
from llmopt.ir.sites import EXPERTS_Q, LINEAR_Q
from llmopt.ir.tolerance import row_error, tolerance
from tests.architectures import make_checkpoint
from tests.frontend import packers
from tests.frontend.quantized import (
    CASES,
    PERMUTED,
    Case,
    by_grid,
    fp8_case,
    gpt_oss_pair,
    gptq_case,
    make_pair,
    plain_model,
)
from tests.frontend.running import captured_logits

LINEARS = 7
WRONG = 0.02
"""A wrong reading is off by more than this; rounding is off by 1e-6."""


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("plain"))


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
    pair = gpt_oss_pair(tmp_path)
    assert count(pair.module(), EXPERTS_Q) == 2
    assert pair.error() <= LIMIT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mxfp4, "nibbles", lambda b: torch.stack((b >> 4, b & 15), dim=-1).flatten(-3))
        assert pair.error() > WRONG


EXPERT = "model.layers.0.mlp.experts.gate_up_proj"


def test_gpt_oss_damaged(tmp_path: Path) -> None:
    pair = gpt_oss_pair(tmp_path / "a", lambda tensors: tensors[f"{EXPERT}_scales"][0, 0, :1].fill_(255))
    with pytest.raises(CheckpointError, match=f"safetensors: tensor {EXPERT}_scales holds scales that are NaN"):
        captured_logits(pair.module(), pair.ids)
    pair = gpt_oss_pair(tmp_path / "b", lambda tensors: tensors.__delitem__(f"{EXPERT}_scales"))
    with pytest.raises(CheckpointError, match=f"tensor {EXPERT}_scales is missing"):
        pair.module()


def test_every_power_of_two() -> None:
    """E8M0 in bfloat16: 2^-127, which has no normal form there, to 2^127."""
    exponents = torch.arange(255, dtype=torch.uint8)
    powers = mxfp4.powers(exponents).double()
    assert torch.equal(powers, 2.0 ** (exponents.double() - 127))


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


@pytest.mark.parametrize("name", ["gptq", "awq", "w4a16-zeros", "w8a8-int8", "fp8-blocks"])
def test_in_bfloat16_codes_and_values_agree_to_the_bit(name: str, plain: Path, tmp_path: Path) -> None:
    """Scales stored in float16 become fp32, not bfloat16."""
    checkpoint = load_checkpoint(make_pair(CASES[name], plain, tmp_path).path)
    codes, values = (capture(checkpoint, torch.bfloat16, None, names).module for names in ((), ("*",)))
    ids = torch.arange(3, 12)[None]
    assert count(codes, LINEAR_Q) == LINEARS
    assert torch.equal(captured_logits(codes, ids), captured_logits(values, ids))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("format", ["gptq", "awq", "fp8"])
def test_experts_stored_one_by_one(name: str, format: str, tmp_path: Path) -> None:
    """Each expert's matrices quantized by themselves become the codes of one op."""
    case = {
        "gptq": gptq_case(group=16),
        "awq": Case(by_grid(packers.awq, 4, 16, False), {"quant_method": "awq", "bits": 4, "group_size": 16}),
        "fp8": fp8_case(
            {"quant_method": "fp8", "weight_block_size": [16, 16]}, ".weight_scale_inv", lambda w: (16, 16)
        ),
    }[format]
    pair = make_pair(case, make_checkpoint(name, tmp_path / "plain"), tmp_path)
    module = pair.module()
    assert count(module, EXPERTS_Q) == 2
    assert row_error(captured_logits(module, pair.ids), pair.expected) <= LIMIT


def test_experts_quantized_in_part_are_refused(tmp_path: Path) -> None:
    """One expert left out of the quantization: no silent fallback."""
    plain = make_checkpoint("qwen3_moe", tmp_path / "plain")
    whole = gptq_case(group=16)

    def pack(stem: str, weight: Tensor) -> tuple[packers.Tensors, Tensor]:
        return ({".weight": weight}, weight) if "experts.3.up_proj" in stem else whole.pack(stem, weight)

    pair = make_pair(Case(pack, whole.config), plain, tmp_path)
    with pytest.raises(UnsupportedModelError, match="quantized in different ways, or not at all"):
        pair.module()
    values = pair.module(dequantize=("*experts*",))
    assert count(values, EXPERTS_Q) == 0
    assert row_error(captured_logits(values, pair.ids), pair.expected) <= LIMIT


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("axis", [0, 1])
def test_unpacking_undoes_packing(bits: int, axis: int) -> None:
    """Any number of values of any width, along either axis; values one place off are seen."""
    random = np.random.default_rng(bits)
    for count in (1, 7, 32, 45, 96):
        values = random.integers(0, 2**bits, (5, count))
        words = packers.words(packers.stream(values, bits))
        packed = words.T.contiguous() if axis == 0 else words
        found = packing.unpack(packed, bits, axis, count).movedim(axis, -1)
        assert torch.equal(found, torch.from_numpy(values).to(torch.uint8))
        assert count == 1 or not torch.equal(packing.unpack(words, bits, 1, count).roll(1, 1), found)
