"""The trained reference model through Hugging Face: perplexity, simulated rounding, greedy text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmopt.calibration.text import read_windows
from llmopt.runtime.protocol import IntArray

WINDOW, WINDOWS = 512, 16


def held_out_windows(shared: Path, model: str) -> IntArray:
    """(WINDOWS, WINDOW) token ids from the start of the held-out text."""
    tokenizer = Tokenizer.from_file(str(shared / "models" / model / "tokenizer.json"))
    text = (shared / "data" / "classics-heldout.txt").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    return ids[: WINDOW * WINDOWS].reshape(WINDOWS, WINDOW)


def load(shared: Path, model: str) -> Any:
    """The checkpoint in fp32 with eager attention."""
    return AutoModelForCausalLM.from_pretrained(
        shared / "models" / model, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def nll(model: Any, windows: IntArray) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of each next token, (windows, window - 1) nats."""
    rows = []
    for window in torch.from_numpy(windows):
        logits = model(window[None]).logits[0, :-1].double()
        rows.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").numpy())
    return np.stack(rows)


def rounded(weight: Tensor, bits: int, group: int | None, symmetric: bool) -> Tensor:
    """Round-to-nearest of a (N, K) weight, fp32: scaled by max |w| (symmetric) or by the range, with a zero point."""
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, -1, group or columns)
    if symmetric:
        scale = grouped.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
        codes = (grouped / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (codes * scale).reshape(rows, columns)
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    codes = ((grouped / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(rows, columns)


@torch.no_grad()
def round_linears(model: Any, bits: int, group: int | None, symmetric: bool) -> Any:
    """Every linear layer but the LM head, rounded in place."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(rounded(module.weight, bits, group, symmetric))
    return model


def calibration_windows(shared: Path, model: str, count: int) -> Tensor:
    """(count, WINDOW) token ids of the training text."""
    tokenizer = Tokenizer.from_file(str(shared / "models" / model / "tokenizer.json"))
    return read_windows(shared / "data" / "classics-train.txt", tokenizer, count * WINDOW, WINDOW).calibration
