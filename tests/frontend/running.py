"""Runs a captured graph on real weights, and transformers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx
from transformers import AutoModelForCausalLM

from llmopt.ir.module import Module


class Runner(fx.Interpreter):
    """Interprets a captured function with its weights read from the table."""

    def __init__(self, module: Module) -> None:
        super().__init__(module.functions["step"])
        self.read = {name: weight.tensor() for name, weight in module.weights.items()}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.read[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return super().call_function(target, args, kwargs)


def captured_logits(module: Module, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (1, T, V) of one sequence."""
    positions = torch.arange(ids.shape[1])[None] if positions is None else positions
    with torch.no_grad():
        return Runner(module).run(ids, positions)[0]


def eager_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a checkpoint with eager attention."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest element of ``b``."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
