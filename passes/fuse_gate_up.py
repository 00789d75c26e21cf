"""Fuses the gate and up projections of a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmopt.ir.linears import LINEARS, stack, stackable
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import Op, Var, aten, match

ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default)

GATED = Op(
    (aten.mul.Tensor,),
    (
        Op(ACTIVATIONS, (Op(LINEARS, (Var("x"),), name="gate"),)),
        Op(LINEARS, (Var("x"),), name="up"),
    ),
    commutes=True,
)


@dataclass(frozen=True)
class FuseGateUp(Pass):
    """Matches ``act(linear_gate(x)) * linear_up(x)``, operands in either order, act one of silu, gelu, relu.

    Replaces the two linears with one over ``<mlp>.gate_up_proj.weight`` (rows gate, up) and a split. Linears over
    codes must share a scheme.
    """

    name: ClassVar[str] = "fuse_gate_up"

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite an MLP."""
        count = 0
        for function in self.served(module):
            for node in function.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
                found = match(GATED, node)
                if found is not None and stackable(module, [found["gate"], found["up"]]):
                    stack(function, module, [found["gate"], found["up"]], "gate_up_proj")
                    count += 1
        module.prune_weights()
        return count


PASS = FuseGateUp
