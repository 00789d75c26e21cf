"""Fusion of linears that read one input into one linear over stacked weights, and its split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from llmopt.ir.module import Module
from llmopt.ir.rewrite import arguments, aten, call, is_weight, results
from llmopt.ir.weights import Concat, Constant, Weight

LINEAR = aten.linear.default


def source_linear(value: object) -> fx.Node | None:
    """The linear a value comes from, through ops that act on their first argument (views, rope, norms, scaling).

    Pieces put together again (a norm a head) count when they all come from one linear.
    """
    while isinstance(value, fx.Node) and value.op == "call_function":
        if value.target is LINEAR:
            return value
        value = value.args[0] if value.args else None
        if isinstance(value, list | tuple):
            sources = {source_linear(piece) for piece in value}
            return sources.pop() if len(sources) == 1 else None
    return None


def stackable(linears: Sequence[fx.Node]) -> bool:
    """Whether the linears are distinct, read one input, and own their weights alone, all of one width and dtype."""
    weights = [node.args[1] for node in linears]
    if len(set(linears)) < len(linears) or len({node.args[0] for node in linears}) > 1:
        return False
    if not all(is_weight(w) and len(w.users) == 1 for w in weights):  # type: ignore[union-attr]
        return False
    if not all(arguments(n)[2] is None or is_weight(arguments(n)[2]) for n in linears):
        return False
    values = [w.meta["val"] for w in weights]  # type: ignore[union-attr]
    return len({(v.shape[1:], v.dtype) for v in values}) == 1


def stack(function: fx.GraphModule, module: Module, linears: Sequence[fx.Node], name: str) -> fx.Node:
    """Replace ``stackable`` linears, in the given row order, by one over ``<common scope>.<name>`` and a split."""
    names = [str(node.args[1].target) for node in linears]  # type: ignore[union-attr]
    rows = [module.weights[n].shape[0] for n in names]
    stem = f"{common_scope(names)}.{name}".lstrip(".")
    weight = module.weight_node(function, f"{stem}.weight", Concat(tuple(module.weights[n] for n in names)))
    bias = _stacked_bias(function, module, linears, f"{stem}.bias")
    first = min(linears)
    with function.graph.inserting_before(first):
        fused = call(function, module, LINEAR, first.args[0], weight, *([bias] if bias is not None else []), like=first)
        split = call(function, module, aten.split_with_sizes.default, fused, rows, -1, like=first)
    for node in (fused, split):
        node.meta["scope"] = common_scope([n.meta.get("scope", "") for n in linears])
    for linear, part in zip(linears, results(function, split)):
        linear.replace_all_uses_with(part)
    for linear in linears:
        operands = [a for a in linear.args[1:] if isinstance(a, fx.Node)]
        function.graph.erase_node(linear)
        for operand in operands:
            if not operand.users:
                function.graph.erase_node(operand)
    return fused


def common_scope(paths: Sequence[str]) -> str:
    """The deepest module path all dotted paths share."""
    shared = []
    for parts in zip(*(path.split(".") for path in paths)):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _stacked_bias(function: fx.GraphModule, module: Module, linears: Sequence[fx.Node], name: str) -> fx.Node | None:
    """The stacked bias; a linear without one among others with one contributes zeros."""
    biases = [arguments(node)[2] for node in linears]
    if all(bias is None for bias in biases):
        return None
    parts: list[Weight] = []
    for node, bias in zip(linears, biases):
        weight = module.weights[str(node.args[1].target)]  # type: ignore[union-attr]
        zeros = Constant(torch.zeros(weight.shape[0], dtype=weight.dtype))
        parts.append(zeros if bias is None else module.weights[str(bias.target)])
    return module.weight_node(function, name, Concat(tuple(parts)))
