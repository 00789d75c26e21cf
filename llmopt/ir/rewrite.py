"""The rewrite helper: patterns over small subgraphs, and insertion of typed nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

import llmopt.ir.ops  # noqa: F401  (registers the dialect)
from llmopt.ir.module import Module

aten: Any = torch.ops.aten
dialect: Any = torch.ops.llmopt

Match = dict[str, Any]


@dataclass(frozen=True)
class Var:
    """Matches any argument that satisfies ``where`` and binds it; the same name must bind the same value."""

    name: str
    where: Callable[[Any], bool] = field(default=lambda _: True)


@dataclass(frozen=True)
class Op:
    """Matches a call of one of ``targets`` whose leading arguments, in schema order and with defaults filled in, match.

    ``name`` binds the node. ``commutes`` also tries the first two arguments swapped. ``only_use``: nothing
    outside the pattern may use the node (the root's users are the rewrite's business). Other values in
    ``args`` are compared with ``==``.
    """

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    name: str | None = None
    commutes: bool = False
    only_use: bool = True


def item(pattern: Any, index: int, name: str | None = None) -> Op:
    """Matches result ``index`` of a call with several results."""
    return Op((operator.getitem,), (pattern, index), name)


def arguments(node: fx.Node) -> list[Any]:
    """The node's arguments in schema order, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args)
    schema: Any = node.target._schema
    given = dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)
    return [given.get(a.name, a.default_value) for a in schema.arguments]


def match(pattern: Any, value: Any, *, root: bool = True) -> Match | None:
    """Bindings when ``value`` matches the pattern, else None."""
    found = _match(pattern, value, {}, root)
    return next(found, None)


def _match(pattern: Any, value: Any, bound: Match, root: bool) -> Iterator[Match]:
    if isinstance(pattern, Var):
        fits = bound[pattern.name] is value if pattern.name in bound else pattern.where(value)
        if fits:
            yield {**bound, pattern.name: value}
    elif not isinstance(pattern, Op):
        if not isinstance(value, fx.Node) and value == pattern:
            yield bound
    elif isinstance(value, fx.Node) and value.op == "call_function" and value.target in pattern.targets:
        if not root and pattern.only_use and len(value.users) > 1:
            return
        given = arguments(value)
        if pattern.name:
            bound = {**bound, pattern.name: value}
        orders = [pattern.args]
        if pattern.commutes:
            first, second, *rest = pattern.args
            orders.append((second, first, *rest))
        for order in orders:
            yield from _match_all(order, given, bound)


def _match_all(patterns: Sequence[Any], values: Sequence[Any], bound: Match) -> Iterator[Match]:
    if not patterns:
        yield bound
        return
    for partial in _match(patterns[0], values[0], bound, False):
        yield from _match_all(patterns[1:], values[1:], partial)


def rewrite(function: fx.GraphModule, pattern: Op, replace: Callable[[fx.Node, Match], fx.Node | None]) -> int:
    """Offer every match, in program order, to ``replace``; returns how many it took.

    ``replace`` gets the root and the bindings and returns the node that takes over the root's users, or None
    to leave the match alone. New nodes go before the root. What the root alone used is erased.
    """
    count = 0
    for node in list(function.graph.nodes):
        if node.op != "call_function" or (not node.users) or (found := match(pattern, node)) is None:
            continue
        with function.graph.inserting_before(node):
            new = replace(node, found)
        if new is not None:
            node.replace_all_uses_with(new)
            count += 1
    if count:
        sweep(function)
    return count


def sweep(function: fx.GraphModule) -> None:
    """Erase calls and weights nothing uses. Placeholders stay."""
    for node in reversed(list(function.graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr"):
            function.graph.erase_node(node)


def call(function: fx.GraphModule, module: Module, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
    """A typed call at the graph's insertion point; ``like`` gives its scope."""
    node = function.graph.call_function(target, args)
    fakes = fx.node.map_arg(args, lambda n: n.meta["val"])
    with module.faking():
        node.meta["val"] = target(*fakes)
    if like is not None and "scope" in like.meta:
        node.meta["scope"] = like.meta["scope"]
    return node


def results(function: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """getitem nodes of a call with several results, inserted right after it."""
    nodes = []
    with function.graph.inserting_after(node):
        for index, value in reversed(list(enumerate(node.meta["val"]))):
            taken = function.graph.call_function(operator.getitem, (node, index))
            taken.meta.update(node.meta, val=value)
            nodes.append(taken)
    return nodes[::-1]


def placeholder(function: fx.GraphModule, after: fx.Node, name: str, value: torch.Tensor) -> fx.Node:
    """A new input right after another one."""
    with function.graph.inserting_after(after):
        node = function.graph.placeholder(name)
    node.meta["val"] = value
    return node


def new_dim(module: Module, name: str, minimum: int, maximum: int) -> torch.SymInt:
    """A fresh symbolic dim, registered under its name in the module."""
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[None])
    # distinct hints, so that no two dims are taken for equal
    example = torch.empty(101 + 2 * len(module.symbols), device="meta")
    fake = module.fake_mode.from_tensor(example, symbolic_context=context, static_shapes=False)
    dim: torch.SymInt = fake.shape[0]
    module.symbols[dim.node.expr.name] = name
    module.dims[name] = (minimum, maximum)
    return dim


def same_dim(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two dims are equal for every value of the symbols (no guard is made)."""
    expr_a, expr_b = (d.node.expr if isinstance(d, torch.SymInt) else d for d in (a, b))
    return bool(expr_a == expr_b)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape for every value of the symbols."""
    return a.dim() == b.dim() and all(same_dim(x, y) for x, y in zip(a.shape, b.shape))


def is_weight(value: Any) -> bool:
    """Whether an argument is a weight of the table."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def copy_graph(source: fx.Graph) -> fx.Graph:
    """A copy whose nodes keep their names and share their values' types."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = dict(node.meta)
    return graph


def copy_module(module: Module) -> Module:
    """A copy that passes may rewrite: functions and tables are its own, weights and values' types are shared."""
    functions = {}
    for name, function in module.functions.items():
        # weights are nodes of the graph, not attributes to copy
        functions[name] = fx.GraphModule(torch.nn.Module(), fx.Graph())
        functions[name].graph = copy_graph(function.graph)
    tables = {f.name: copy(getattr(module, f.name)) for f in fields(module) if f.name != "propagated"}
    return replace(module, **{**tables, "functions": functions})


def precedes(a: fx.Node, b: fx.Node) -> bool:
    """Whether ``a`` comes before ``b`` in the program."""
    return a < b
