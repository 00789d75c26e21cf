"""Fork the captured function into the functions a target compiles."""

from __future__ import annotations

import torch
from torch import fx

from llmopt.ir.module import Module
from llmopt.ir.rewrite import copy_graph


def fork(module: Module, functions: tuple[str, ...]) -> None:
    """Replace the captured ``step`` by one copy for each name; a single ``step`` stays as it is."""
    if functions == ("step",):
        return
    captured = module.functions.pop("step")
    for name in functions:
        module.functions[name] = fx.GraphModule(torch.nn.Module(), fx.Graph())
        # weights are nodes of the graph, not attributes to copy
        module.functions[name].graph = copy_graph(captured.graph)
