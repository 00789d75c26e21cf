"""Fuses a residual addition with the normalization of its sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import Op, Var, arguments, aten, call, dialect, is_weight, match, results, same_shape, sweep

ADD = Op((aten.add.Tensor,), (Var("residual"), Var("x"), 1), name="add", only_use=False)
RMS = Op((dialect.rms_norm.default,), (ADD,))
LAYER = Op((aten.layer_norm.default,), (ADD,))


@dataclass(frozen=True)
class FuseAddNorm(Pass):
    """Matches rms_norm or layer_norm (last axis) of ``add(residual, x)``, both of one shape and dtype.

    Replaces with ``llmopt.add_rms_norm`` or ``llmopt.add_layer_norm``, whose second result is the sum for
    everything else that used it. A sum under two norms fuses with the first. A norm *before* the addition
    (Gemma 2's post-norms) is no match by itself; its sum fuses with the norm after it.
    """

    name: ClassVar[str] = "fuse_add_norm"

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a pair."""
        count = 0
        for function in self.served(module):
            for node in list(function.graph.nodes):
                count += self._fuse(module, function, node)
            sweep(function)
        return count

    def _fuse(self, module: Module, function: fx.GraphModule, norm: fx.Node) -> bool:
        found = match(RMS, norm) or match(LAYER, norm)
        if found is None or not addends_fit(found):
            return False
        _, *parameters = arguments(norm)
        if norm.target is aten.layer_norm.default:
            shape, weight, bias, eps, _ = parameters
            if len(shape) != 1:
                return False
            target, parameters = dialect.add_layer_norm.default, [weight, bias, eps]
        else:
            target = dialect.add_rms_norm.default
        if not all(is_weight(p) for p in parameters if isinstance(p, fx.Node)):
            return False
        add = found["add"]
        with function.graph.inserting_before(add):
            fused = call(function, module, target, found["x"], found["residual"], *parameters, like=norm)
        normed, total = results(function, fused)
        norm.replace_all_uses_with(normed)
        add.replace_all_uses_with(total)
        function.graph.erase_node(norm)
        function.graph.erase_node(add)
        return True


def addends_fit(found: dict[str, Any]) -> bool:
    """Both addends are tensors of the sum's shape and dtype: nothing broadcasts or promotes."""
    total = found["add"].meta["val"]
    addends = [found["x"], found["residual"]]
    if not all(isinstance(a, fx.Node) for a in addends):
        return False
    return all(same_shape(a.meta["val"], total) and a.meta["val"].dtype == total.dtype for a in addends)


PASS = FuseAddNorm
