"""Fork the captured function into the functions a target compiles."""

from __future__ import annotations

import copy

import torch
from torch import fx

from llmopt.ir.module import Module


def fork(module: Module, functions: tuple[str, ...]) -> None:
    """Replace the captured ``step`` by one copy for each name; a single ``step`` stays as it is."""
    if functions == ("step",):
        return
    captured = module.functions.pop("step")
    for name in functions:
        graph = fx.Graph()
        environment: dict[fx.Node, fx.Node] = {}
        for node in captured.graph.nodes:
            environment[node] = graph.node_copy(node, environment.__getitem__)
            environment[node].meta = copy.copy(node.meta)
        module.functions[name] = fx.GraphModule(torch.nn.Module(), fx.Graph())
        module.functions[name].graph = graph  # weights are nodes of the graph, not attributes to copy
