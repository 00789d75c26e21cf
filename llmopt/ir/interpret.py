"""Runs a module's function with torch, node by node: the reference semantics of the IR before lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import llmopt.ir.ops  # noqa: F401  (registers the dialect)
from llmopt.errors import PassError
from llmopt.ir.module import Module

Observer = Callable[[fx.Node, Any], None]
JointObserver = Callable[[fx.Node, list[Any]], None]


def run_module(
    module: Module, function_name: str, inputs: Mapping[str, Tensor], observe: Observer | None = None
) -> list[Tensor]:
    """Outputs of a function for real inputs by placeholder name; ``observe`` sees every node but weights, and its
    value. Raises PassError for a missing input."""
    return run_together(module, function_name, [inputs], observe and alone(observe))[0]


def alone(observe: Observer) -> JointObserver:
    """What sees the values of one run, as what sees those of several."""
    return lambda node, values: observe(node, values[0])


@torch.no_grad()
def run_together(
    module: Module, function_name: str, inputs: Sequence[Mapping[str, Tensor]], observe: JointObserver | None = None
) -> list[list[Tensor]]:
    """Outputs for each of some inputs, which go through the function side by side, node by node.

    A weight is read from the table, to the inputs' device, when a node first needs it, once for all, and dropped
    after its last use. ``observe`` sees every other node with its values. Raises PassError for a missing input.
    """
    graph = module.functions[function_name].graph
    named = [n.name for n in graph.nodes if n.op == "placeholder"]
    for given in inputs:
        if missing := [name for name in named if name not in given]:
            raise PassError(f"missing inputs {', '.join(missing)}", where=f"function {function_name}")
    runs = [Run(module, given) for given in inputs]
    dead = last_uses(graph)
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in runs[0].values:
                weight = module.weights[str(source.target)].tensor(runs[0].device)
                for run in runs:
                    run.values[source] = weight
        if node.op == "output":
            return [[run.real(n) for n in node.args[0]] for run in runs]
        if node.op != "get_attr":
            values = [run.value(node) for run in runs]
            for run, value in zip(runs, values):
                run.values[node] = value
            if observe is not None:
                observe(node, values)
        for source in dead.get(node, ()):
            for run in runs:
                del run.values[source]
    return []


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """By node, whose values nothing after it needs."""
    last_use: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last_use |= dict.fromkeys(node.all_input_nodes, node)
    dead: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last_use.items():
        dead.setdefault(user, []).append(source)
    return dead


class Run:
    """One interpretation of a graph: values so far, weights among them."""

    def __init__(self, module: Module, inputs: Mapping[str, Tensor]) -> None:
        self.module, self.inputs = module, inputs
        self.device = next(iter(inputs.values())).device
        self.symbols: dict[Any, int] = {}
        self.values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The value of a placeholder or call, whose inputs have theirs."""
        if node.op == "placeholder":
            value = self.inputs[node.name]
            self._bind(node.meta["val"].shape, value.shape)
            return value
        args, kwargs = self.real(node.args), self.real(node.kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _bind(self, declared: tuple[Any, ...], actual: tuple[int, ...]) -> None:
        for symbolic, size in zip(declared, actual, strict=True):
            if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
                self.symbols[symbolic.node.expr] = size

    def real(self, arg: Any) -> Any:
        """An argument with values in place of nodes and symbols."""
        match arg:
            case fx.Node():
                return self.values[arg]
            case torch.SymInt():
                return int(arg.node.expr.xreplace(self.symbols))
            case torch.device():
                return self.device
            case dict():
                return {key: self.real(item) for key, item in arg.items()}
            case list() | tuple():
                return [self.real(item) for item in arg]
        return arg
