"""Fake values of a graph's nodes, computed once for each call and types of arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


class Propagation(FakeTensorProp):
    """FakeTensorProp that takes weights from their nodes (no attribute stands behind them) and remembers calls.

    ``known`` maps a call's op and arguments, tensors by their types, to the fake value it gave. Passes leave most of
    a graph as it was, and layers repeat each other: of the 797 calls that eight passes leave of Gemma 3's three
    layers, 69 differ.
    """

    current: fx.Node | None = None

    def __init__(self, function: fx.GraphModule, mode: Any, known: dict[Any, Any]) -> None:
        super().__init__(function, mode)
        self.known = known

    def run_node(self, n: fx.Node) -> Any:
        """The node's fake value; ``current`` is the node being computed, for errors."""
        self.current = n
        if n.op == "get_attr":
            return n.meta["val"]
        if n.op != "call_function":
            return super().run_node(n)
        key = (n.target, *(described(argument) for argument in self.fetch_args_kwargs_from_env(n)))
        if key not in self.known:
            self.known[key] = super().run_node(n)
        n.meta["val"] = self.known[key]
        return n.meta["val"]


def described(argument: Any) -> Any:
    """A key equal for arguments that an op's fake implementation cannot tell apart."""
    if isinstance(argument, torch.Tensor):
        sizes = (*argument.shape, *argument.stride(), argument.storage_offset())
        return argument.dtype, argument.device, argument.requires_grad, tuple(map(described, sizes))
    if isinstance(argument, torch.SymInt | torch.SymFloat | torch.SymBool):
        return type(argument), argument.node.expr
    if isinstance(argument, list | tuple):
        return type(argument), tuple(map(described, argument))
    if isinstance(argument, dict):
        return tuple((name, described(value)) for name, value in argument.items())
    if isinstance(argument, slice):
        return slice, described((argument.start, argument.stop, argument.step))
    return type(argument), argument  # 1, 1.0 and True are equal, and promote differently
