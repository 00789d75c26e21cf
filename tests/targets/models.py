"""Tiny architectures compiled to programs, and Hugging Face eager beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from llmopt.compiler import pass_context
from llmopt.ir.pass_manager import PassManager
from llmopt.ir.weights import Constant
from llmopt.lower.lowering import lower
from llmopt.lower.readers import Reader, readers
from llmopt.program import Program
from llmopt.recipe import parse_recipe
from llmopt.registry import load_target
from llmopt.runtime.protocol import FloatArray, IntArray
from tests.captured import captured, checkpoint

CONTEXT = 64
RECIPE = """
target: {target}
dtype: {dtype}
max_context: {context}
passes:
  - eliminate_noops
  - fuse_qkv
  - fuse_gate_up
  - fuse_gated_activation
  - fuse_add_norm
  - rewrite_kv_cache: {{layout: {layout}{options}}}
  - fuse_rope_kv_write
  - prune_logits
"""
LENGTHS, PROMPTS = (23, 9, 14), (17, 1, 6)
"""Tokens of each sequence, and how many of them go in as prefill chunks; the first outgrows every window."""


@dataclass(frozen=True)
class Compiled:
    """A program with its weights, and the sequences with the logits Hugging Face eager gives (fp32)."""

    program: Program
    weights: dict[str, Reader]
    sequences: list[IntArray]
    expected: list[FloatArray]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every weight in memory."""
        return {name: reader.weight.tensor() for name, reader in self.weights.items()}


@cache
def compiled(architecture: str, target: str, layout: str, options: str = "", dtype: str = "float32") -> Compiled:
    """Compile a tiny random model of an architecture with every pass of the repository."""
    path = checkpoint(architecture)
    recipe = parse_recipe(RECIPE.format(target=target, layout=layout, options=options, dtype=dtype, context=CONTEXT))
    module = captured(path, recipe.torch_dtype, CONTEXT)
    PassManager().run(module, recipe.passes, pass_context(load_target(target), recipe))
    module.prune_weights()
    module.weights = {name: Constant(weight.tensor()) for name, weight in module.weights.items()}
    program = lower(module)
    sequences, expected = eager(path, module.config.vocab_size)
    return Compiled(program, readers(program, module.weights), sequences, expected)


@cache
@torch.no_grad()
def eager(path: Path, vocab_size: int) -> tuple[list[IntArray], list[FloatArray]]:
    """Sequences of random tokens and the logits of each, alone, through Hugging Face's eager attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    random = np.random.default_rng(0)
    sequences = [random.integers(0, vocab_size, n).astype(np.int64) for n in LENGTHS]
    return sequences, [model(torch.from_numpy(s)[None], use_cache=False).logits[0].numpy() for s in sequences]


def worst(found: list[FloatArray], expected: list[FloatArray]) -> float:
    """Largest absolute error of a sequence relative to its largest logit; NaN counts as infinite."""
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True)]
    return float("inf") if np.isnan(errors).any() else float(max(errors))
