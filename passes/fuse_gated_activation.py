"""Fuses the activation and the product of a gated MLP."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import Match, Op, Var, arguments, aten, call, dialect, rewrite, same_dim

PATTERN = Op(
    (aten.mul.Tensor,),
    (
        Op((aten.silu.default, aten.gelu.default, aten.relu.default), (Var("gate"),), name="activation"),
        Var("up"),
    ),
    commutes=True,
)


@dataclass(frozen=True)
class FuseGatedActivation(Pass):
    """Matches ``act(x[..., :I]) * x[..., I:]``, operands in either order, halves by split, chunk or slice.

    Replaces with ``llmopt.gated_activation(x, kind)``, kind silu, gelu, gelu_tanh or relu.
    """

    name: ClassVar[str] = "fuse_gated_activation"
    after: ClassVar[tuple[str, ...]] = ("fuse_gate_up",)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite an MLP."""
        count = 0
        for function in self.served(module):

            def replace(root: fx.Node, found: Match, function: fx.GraphModule = function) -> fx.Node | None:
                gate, up = half(found["gate"]), half(found["up"])
                if gate is None or up is None or gate[0] is not up[0] or (gate[1], up[1]) != (0, 1):
                    return None
                kind = kind_of(found["activation"])
                return call(function, module, dialect.gated_activation.default, gate[0], kind, like=root)

            count += rewrite(function, PATTERN, replace)
        return count


def kind_of(activation: fx.Node) -> str:
    """The name gated_activation gives an aten activation."""
    if activation.target is aten.gelu.default:
        return "gelu_tanh" if arguments(activation)[1] == "tanh" else "gelu"
    return "silu" if activation.target is aten.silu.default else "relu"


def half(node: Any) -> tuple[fx.Node, int] | None:
    """(source, 0 or 1) when the node is the first or second half of a tensor's last axis."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is operator.getitem:
        split: Any = node.args[0]
        source, index = split.args[0], node.args[1]
        if split.target not in SPLITS or len(split.meta["val"]) != 2 or not is_last(split, 2):
            return None
    elif node.target is aten.slice.Tensor and is_last(node, 1):
        source, start, step = node.args[0], arguments(node)[2] or 0, arguments(node)[4]
        index = 0 if start == 0 else 1
        if step != 1 or start not in (0, source.meta["val"].shape[-1] // 2):  # type: ignore[union-attr]
            return None
    else:
        return None
    halves = source.meta["val"].shape[-1], 2 * node.meta["val"].shape[-1]
    return (source, index) if same_dim(*halves) else None  # type: ignore[return-value]


def is_last(node: fx.Node, position: int) -> bool:
    """Whether the dim argument at ``position`` names the last axis."""
    return arguments(node)[position] in (-1, node.args[0].meta["val"].dim() - 1)  # type: ignore[union-attr]


SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.split.sizes)

PASS = FuseGatedActivation
