"""Removes nodes that compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import arguments, aten, same_shape, sweep

SHAPERS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
COPIES = {
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.lift_fresh_copy.default, aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device,
    aten.to.other, aten.type_as.default, aten.expand.default, *SHAPERS,
}  # fmt: skip


@dataclass(frozen=True)
class EliminateNoops(Pass):
    """Matches copies, casts to the same dtype, views and expands to the same shape, full slices, dropout of
    inference, additions of 0 and products by 1, transposes that undo each other, a view of a view, one-piece
    cats, and weights nothing reads. Replaces with the operand.

    Remaining ``view`` becomes ``reshape``: without the copies, memory order is the target's business.
    """

    name: ClassVar[str] = "eliminate_noops"

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a removed node."""
        count = 0
        for function in self.served(module):
            for node in list(function.graph.nodes):
                if node.op != "call_function" or not node.users:
                    continue
                if node.target in SHAPERS:
                    node.target = aten.reshape.default
                    skip_inner_view(node)
                source = operand(node)
                if source is not None:
                    node.replace_all_uses_with(source)
                    count += 1
            sweep(function)
        module.prune_weights()
        return count


def operand(node: fx.Node) -> fx.Node | None:
    """The node this one equals, or None."""
    given = arguments(node)
    source = given[0] if given else None
    if node.target is aten.cat.default and len(given[0]) == 1:
        return given[0][0]  # type: ignore[no-any-return]
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.transpose.int and source.target is aten.transpose.int and undoes(node, source):
        return source.args[0]  # type: ignore[return-value]
    if not same_type(node, source):
        return None
    if node.target in COPIES or (node.target in NEUTRAL and NEUTRAL[node.target](given)):
        return source
    return None


def same_type(a: fx.Node, b: fx.Node) -> bool:
    """Both tensors of one shape and dtype."""
    x, y = a.meta["val"], b.meta["val"]
    return hasattr(x, "dtype") and hasattr(y, "dtype") and x.dtype == y.dtype and same_shape(x, y)


def undoes(node: fx.Node, source: fx.Node) -> bool:
    """Whether two transposes swap the same axes."""
    rank = node.meta["val"].dim()
    return {a % rank for a in node.args[1:]} == {a % rank for a in source.args[1:]}


def _is(number: int) -> Callable[[list[Any]], bool]:
    return lambda given: not isinstance(given[1], fx.Node) and given[1] == number


NEUTRAL: dict[Any, Callable[[list[Any]], bool]] = {
    aten.slice.Tensor: lambda given: given[4] == 1,  # of the operand's shape: it keeps everything
    aten.dropout.default: lambda given: given[1] == 0 or not given[2],
    aten.add.Tensor: _is(0),
    aten.sub.Tensor: _is(0),
    aten.mul.Tensor: _is(1),
    aten.div.Tensor: _is(1),
}
"""Ops that give back their operand, when the result has its type, for these arguments."""


def skip_inner_view(node: fx.Node) -> None:
    """``reshape(reshape(x))`` reads x; a -1 keeps its meaning because the element count is the same."""
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target in SHAPERS:
        node.update_arg(0, source.args[0])


PASS = EliminateNoops
