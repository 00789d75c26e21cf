"""Runs passes on a module in tests, and what must hold around them."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.ir.check import PassChecker
from llmopt.ir.feed import run_sequence
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext, PassManager, PassRecord
from llmopt.ir.text import print_function
from llmopt.recipe import build_pass
from llmopt.registry import load_target

TOKENS = [3, 14, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]

FUSIONS = ("eliminate_noops", "fuse_qkv", "fuse_gate_up", "fuse_gated_activation", "fuse_add_norm")


def context(dtype: torch.dtype = torch.float32) -> PassContext:
    """The reference target's context."""
    return PassContext(load_target("reference").info, dtype)


def run(module: Module, *passes: str | Pass | tuple[str, dict[str, Any]]) -> list[PassRecord]:
    """Run passes (names, names with options, or instances) with verification after each."""
    return PassManager().run(module, [build(p) for p in passes], context())


def build(entry: str | Pass | tuple[str, dict[str, Any]]) -> Pass:
    """A pass of a name, a name with options, or itself."""
    if isinstance(entry, Pass):
        return entry
    return build_pass(entry) if isinstance(entry, str) else build_pass(*entry)


def rewrites(module: Module, *passes: str | Pass | tuple[str, dict[str, Any]]) -> int:
    """Rewrites the last of the passes made."""
    return run(module, *passes)[-1].rewrites


def logits(module: Module, chunks: list[int] | None = None, tokens: list[int] | None = None) -> torch.Tensor:
    """Logits of the test sequence, in steps."""
    return run_sequence(module, "step", tokens or TOKENS, chunks)


def checked(module: Module, *passes: str | Pass | tuple[str, dict[str, Any]]) -> PassChecker:
    """Run passes under the checker; raises DriftError when one drifts."""
    checker = PassChecker(TOKENS)
    PassManager(check=checker).run(module, [build(p) for p in passes], context())
    return checker


def text(module: Module) -> str:
    """The step function's IR."""
    return print_function(module, "step")


def ops(module: Module) -> list[str]:
    """Op names of the step function in order, getitems left out."""
    return [str(n.target).removesuffix(".default") for n in module.functions["step"].graph.nodes
            if n.op == "call_function" and "getitem" not in str(n.target)]  # fmt: skip
