"""Fusion of linears that read one input into one linear over stacked weights, and its split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from llmopt.ir.module import Module
from llmopt.ir.rewrite import arguments, aten, call, dialect, is_weight, results
from llmopt.ir.weights import Concat, Constant, Weight

LINEAR, LINEAR_Q = aten.linear.default, dialect.linear_q.default
LINEARS = (LINEAR, LINEAR_Q)
ROWS = {LINEAR: slice(1, 2), LINEAR_Q: slice(1, 4)}
"""Arguments that are stacked: the weight; codes, scales and zeros."""
BIAS = {LINEAR: 2, LINEAR_Q: 4}
SHARED = {LINEAR: slice(3, None), LINEAR_Q: slice(5, None)}
"""Arguments all linears of a stack have in common: g_idx and the scheme."""


def source_linear(value: object) -> fx.Node | None:
    """The linear a value comes from, through ops that act on their first argument (views, rope, norms, scaling).

    Pieces put together again (a norm a head) count when they all come from one linear.
    """
    while isinstance(value, fx.Node) and value.op == "call_function":
        if value.target in LINEARS:
            return value
        value = value.args[0] if value.args else None
        if isinstance(value, list | tuple):
            sources = {source_linear(piece) for piece in value}
            return sources.pop() if len(sources) == 1 else None
    return None


def stackable(module: Module, linears: Sequence[fx.Node]) -> bool:
    """Whether the linears are distinct, read one input, and own their weights alone, of one width, dtype and scheme."""
    if len(set(linears)) < len(linears) or len({(node.target, node.args[0]) for node in linears}) > 1:
        return False
    given, op = [arguments(node) for node in linears], linears[0].target
    if not all(args[BIAS[op]] is None or is_weight(args[BIAS[op]]) for args in given):
        return False
    if any(not _same(module, values) for values in zip(*(args[SHARED[op]] for args in given))):
        return False
    return all(_alike(values) for values in zip(*(args[ROWS[op]] for args in given)))


def _same(module: Module, values: Sequence[object]) -> bool:
    """Whether arguments are equal; weights (g_idx) by their values."""
    if not all(is_weight(value) for value in values):
        return len(set(values)) == 1
    first, *others = (module.weights[str(value.target)].tensor() for value in values)  # type: ignore[attr-defined]
    return all(torch.equal(first, other) for other in others)


def _alike(values: Sequence[object]) -> bool:
    """Whether arguments are weights of one width and dtype that nothing else reads, or all absent."""
    if all(value is None for value in values):
        return True
    if not all(isinstance(v, fx.Node) and is_weight(v) and len(v.users) == 1 for v in values):
        return False
    fakes = [value.meta["val"] for value in values]  # type: ignore[attr-defined]
    return len({(fake.shape[1:], fake.dtype) for fake in fakes}) == 1


def stack(function: fx.GraphModule, module: Module, linears: Sequence[fx.Node], name: str) -> fx.Node:
    """Replace ``stackable`` linears, in the given row order, by one over ``<common scope>.<name>`` and a split."""
    op, given = linears[0].target, [arguments(node) for node in linears]
    names = [str(args[1].target).removesuffix(".codes") for args in given]
    rows = [args[1].meta["val"].shape[0] for args in given]
    stem = f"{common_scope(names)}.{name}".lstrip(".")
    stacked = []
    for kind, values in zip(("", ".scales", ".zeros"), zip(*(args[ROWS[op]] for args in given))):
        end = ".codes" if op is LINEAR_Q and not kind else kind
        parts = tuple(module.weights[str(value.target)] for value in values if value is not None)
        stacked.append(module.weight_node(function, f"{stem}.weight{end}", Concat(parts)) if parts else None)
    if op is LINEAR_Q and module.originals.keys() >= set(names):
        module.originals[f"{stem}.weight"] = Concat(tuple(module.originals.pop(n) for n in names))
    bias = _stacked_bias(function, module, linears, f"{stem}.bias")
    shared = given[0][SHARED[op]]
    after = [bias, *shared] if shared or bias is not None else []
    first = min(linears)
    with function.graph.inserting_before(first):
        fused = call(function, module, op, first.args[0], *stacked, *after, like=first)
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
    biases = [arguments(node)[BIAS[node.target]] for node in linears]
    if all(bias is None for bias in biases):
        return None
    dtype = next(bias.meta["val"].dtype for bias in biases if bias is not None)
    parts: list[Weight] = []
    for node, bias in zip(linears, biases):
        rows = node.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
        parts.append(Constant(torch.zeros(rows, dtype=dtype)) if bias is None else module.weights[str(bias.target)])
    return module.weight_node(function, name, Concat(tuple(parts)))
