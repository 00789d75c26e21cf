"""Runs a module's function with torch, node by node: the reference semantics of the IR before lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

import llmopt.ir.ops  # noqa: F401  (registers the dialect)
from llmopt.errors import PassError
from llmopt.ir.module import Module

Observer = Callable[[fx.Node, Any], None]


def run_module(
    module: Module, function_name: str, inputs: Mapping[str, Tensor], observe: Observer | None = None
) -> list[Tensor]:
    """Outputs of a function for real inputs by placeholder name.

    A weight is read from the table, to the inputs' device, when a node first needs it, and dropped after its last
    use. ``observe`` sees every other node with its value. Raises PassError for a missing input.
    """
    graph = module.functions[function_name].graph
    missing = [n.name for n in graph.nodes if n.op == "placeholder" and n.name not in inputs]
    if missing:
        raise PassError(f"missing inputs {', '.join(missing)}", where=f"function {function_name}")
    return Run(module, inputs, observe)(graph)


class Run:
    """One interpretation of a graph."""

    def __init__(self, module: Module, inputs: Mapping[str, Tensor], observe: Observer | None) -> None:
        self.module, self.inputs, self.observe = module, inputs, observe
        self.device = next(iter(inputs.values())).device
        self.symbols: dict[Any, int] = {}
        self.values: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def __call__(self, graph: fx.Graph) -> list[Tensor]:
        last_use: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            last_use |= dict.fromkeys(node.all_input_nodes, node)
        dead: dict[fx.Node, list[fx.Node]] = {}
        for source, user in last_use.items():
            dead.setdefault(user, []).append(source)
        for node in graph.nodes:
            if node.op == "output":
                return [self._real(n) for n in node.args[0]]
            if node.op != "get_attr":
                self.values[node] = value = self.value(node)
                if self.observe is not None:
                    self.observe(node, value)
            for source in dead.get(node, ()):
                del self.values[source]
        return []

    def value(self, node: fx.Node) -> Any:
        """The value of a placeholder or call; a call's inputs have theirs, weights excepted."""
        if node.op == "placeholder":
            value = self.inputs[node.name]
            self._bind(node.meta["val"].shape, value.shape)
            return value
        args, kwargs = self._real(node.args), self._real(node.kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _bind(self, declared: tuple[Any, ...], actual: tuple[int, ...]) -> None:
        for symbolic, size in zip(declared, actual, strict=True):
            if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
                self.symbols[symbolic.node.expr] = size

    def _real(self, arg: Any) -> Any:
        match arg:
            case fx.Node():
                if arg.op == "get_attr" and arg not in self.values:
                    self.values[arg] = self.module.weights[str(arg.target)].tensor(self.device)
                return self.values[arg]
            case torch.SymInt():
                return int(arg.node.expr.xreplace(self.symbols))
            case torch.device():
                return self.device
            case dict():
                return {key: self._real(item) for key, item in arg.items()}
            case list() | tuple():
                return [self._real(item) for item in arg]
        return arg
