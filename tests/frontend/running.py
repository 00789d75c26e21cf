"""Runs a captured graph on real weights, and transformers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmopt.ir.interpret import run_module
from llmopt.ir.module import Module


def captured_logits(module: Module, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (1, T, V) of one sequence."""
    positions = torch.arange(ids.shape[1])[None] if positions is None else positions
    return run_module(module, "step", {"input_ids": ids, "position_ids": positions})[0]


def eager_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a checkpoint with eager attention."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest element of ``b``."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
