"""Modules, windows and passes for calibration in tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.ir.module import Module
from llmopt.ir.pass_manager import PassManager, PassRecord
from llmopt.ir.samples import Calibration
from tests.ir.handmade import Builder, aten, dialect
from tests.passes.running import build, context


def windows(count: int = 6, length: int = 24, vocab: int = 17, seed: int = 0) -> Tensor:
    """Random token ids (count, length)."""
    return torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(seed))


def calibrated(
    module: Module,
    folder: Path,
    *passes: str | tuple[str, dict[str, Any]],
    tokens: Tensor | None = None,
    **options: Any,
) -> list[PassRecord]:
    """Run passes with calibration windows kept in a folder."""
    calibration = Calibration(windows() if tokens is None else tokens, folder, **options)
    return PassManager().run(module, [build(p) for p in passes], replace(context(), calibration=calibration))


def mlp(width: int = 64, layers: int = 2, vocab: int = 17) -> Module:
    """Gated MLP blocks with norms and residuals, whose channels are correlated: inputs come from ``vocab`` tokens."""
    b = Builder(vocab=vocab)
    x = b.embed(width)
    for i in range(layers):
        h = b.rms_norm(x, f"layers.{i}.norm")
        gate, up = (b.linear(h, f"layers.{i}.{n}_proj", 2 * width) for n in ("gate", "up"))
        hidden = b.call(aten.mul.Tensor, b.call(aten.silu.default, gate), up)
        x = b.call(aten.add.Tensor, x, b.linear(hidden, f"layers.{i}.down_proj", width))
    return b.finish(b.linear(b.rms_norm(x, "norm"), "lm_head", vocab))


def mixture(activation: str = "silu", width: int = 64, inner: int = 96, experts: int = 4, vocab: int = 61) -> Module:
    """A block of experts, two a token, as Qwen3-MoE's (``silu``) or gpt-oss' (``swiglu_oai``, with biases).

    The channels of its inputs are correlated, as each token has one input.
    """
    b = Builder(vocab=vocab)
    x = b.embed(width)
    h = b.call(aten.reshape.default, b.rms_norm(x, "norm"), [-1, width])
    scores = b.call(aten.softmax.int, b.linear(h, "router", experts, bias=True), -1)
    weight, index = b.split(aten.topk.default, scores, 2)
    shapes = {"gate_up": (experts, 2 * inner, width), "down": (experts, width, inner)}
    matrices = [b.weight(f"experts.{name}", *shape) for name, shape in shapes.items()]
    biases = [
        b.weight(f"experts.{name}_bias", *s[:2]) if activation == "swiglu_oai" else None for name, s in shapes.items()
    ]
    out = b.call(dialect.moe_experts.default, h, index, weight, *matrices, *biases, activation)
    x = b.call(aten.add.Tensor, x, b.call(aten.unsqueeze.default, out, 0))
    return b.finish(b.linear(b.rms_norm(x, "last"), "lm_head", vocab))


__all__ = ["Builder", "aten", "calibrated", "dialect", "mixture", "mlp", "windows"]
