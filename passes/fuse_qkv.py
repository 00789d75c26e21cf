"""Fuses the query, key and value projections of an attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmopt.ir.linears import source_linear, stack, stackable
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import dialect


@dataclass(frozen=True)
class FuseQkv(Pass):
    """Matches an attention whose q, k and v come from three linears of one input, through views, norms and rope.

    Replaces with one linear over the stacked weights (``<layer>.qkv_proj.weight``, rows q, k, v) and a split.
    Linears over codes stack when they share a scheme (and the order of columns). Biases stack too (zeros where only
    some have one). Weights used elsewhere, and projections the model already stores fused, stay as they are.
    """

    name: ClassVar[str] = "fuse_qkv"

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite an attention layer."""
        count = 0
        for function in self.served(module):
            for node in function.graph.find_nodes(op="call_function", target=dialect.attention.default):
                linears = [found for value in node.args[:3] if (found := source_linear(value)) is not None]
                if len(linears) == 3 and stackable(module, linears):
                    stack(function, module, linears, "qkv_proj")
                    count += 1
        module.prune_weights()
        return count


PASS = FuseQkv
