"""Small rewrites that bring a trace to the fixed vocabulary: transposed weights, partial rotations."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from llmopt.frontend.fills import slice_arguments
from llmopt.ir.folding import VIEWS
from llmopt.ir.weights import Column, Constant, Transposed, Weight

aten = torch.ops.aten
FLIPS = (aten.t.default, aten.transpose.int, aten.permute.default)


def fold(graph: fx.Graph, table: dict[str, Weight]) -> None:
    """Apply every rewrite of this file, in place."""
    fold_scalars(graph, table)
    fold_transposes(graph, table)
    fold_lookups(graph, table)
    fold_partial_ropes(graph)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def fold_scalars(graph: fx.Graph, table: dict[str, Weight]) -> None:
    """Matches x * c with c a computed 0-d buffer. Replaces c with its number (Gemma's embedding scale)."""
    for node in list(graph.find_nodes(op="get_attr")):
        weight = table[str(node.target)]
        if not isinstance(weight, Constant) or weight.shape:
            continue
        for user in list(node.users):
            if user.target is aten.mul.Tensor and user.args[1] is node and keeps_dtype(user):
                user.update_arg(1, float(weight.value))


def keeps_dtype(node: fx.Node) -> bool:
    """Whether a product has the dtype of its first factor."""
    return node.meta["val"].dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr,no-any-return]


def fold_transposes(graph: fx.Graph, table: dict[str, Weight]) -> None:
    """Matches a weight whose last axes are swapped. Replaces with a Transposed weight."""
    for node in list(graph.find_nodes(op="get_attr")):
        flips = [user for user in node.users if swaps_last_axes(user)]
        if not flips:
            continue
        name = str(node.target)
        only = len(flips) == len(node.users)
        target = name if only else f"{name}.transposed"
        table[target] = Transposed(table[name])
        with graph.inserting_before(node):
            new = graph.get_attr(target)
        new.meta.update(node.meta, val=flips[0].meta["val"].contiguous())
        for user in flips:
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        if only:
            graph.erase_node(node)


def swaps_last_axes(node: fx.Node) -> bool:
    """Whether a node swaps the last two axes of its input and nothing else."""
    if node.target not in FLIPS:
        return False
    given: tuple[Any, ...] = tuple(node.args)
    rank = given[0].meta["val"].dim()
    if node.target is aten.t.default:
        return bool(rank == 2)
    if node.target is aten.transpose.int:
        return {axis % rank for axis in given[1:]} == {rank - 2, rank - 1}
    return [axis % rank for axis in given[1]] == [*range(rank - 2), rank - 1, rank - 2]


def fold_lookups(graph: fx.Graph, table: dict[str, Weight]) -> None:
    """Matches vector[index] of a weight and what is an index already. Replaces with an embedding of one column (scales
    of experts)."""
    for node in list(graph.find_nodes(op="call_function", target=aten.index.Tensor)):
        source, indices = node.args[:2]
        if not isinstance(source, fx.Node) or source.op != "get_attr" or len(table[str(source.target)].shape) != 1:
            continue
        if not isinstance(indices, list | tuple) or len(indices) != 1 or not is_index(indices[0]):
            continue
        name = f"{source.target}.column"
        table[name] = Column(table[str(source.target)])
        with graph.inserting_before(node):
            column = graph.get_attr(name)
            column.meta["val"] = source.meta["val"].new_empty((*source.meta["val"].shape, 1))
            found = graph.call_function(aten.embedding.default, (column, indices[0]))
            found.meta = dict(node.meta) | {"val": node.meta["val"].new_empty((*node.meta["val"].shape, 1))}
            flat = graph.call_function(aten.squeeze.dim, (found, -1))
            flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.erase_node(node)


def is_index(node: object) -> bool:
    """Whether a value's elements are surely indices from 0 on: an input, or the choice of a topk."""
    while isinstance(node, fx.Node) and node.target in VIEWS:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    chosen = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return node.op == "placeholder" or (isinstance(chosen, fx.Node) and chosen.target is aten.topk.default)


def fold_partial_ropes(graph: fx.Graph) -> None:
    """Matches cat(rope(x[..., :2F]), x[..., 2F:]). Replaces with rope(x), which passes the rest through."""
    for node in list(graph.find_nodes(op="call_function", target=aten.cat.default)):
        parts = node.args[0]
        if not isinstance(parts, list | tuple) or len(parts) != 2 or len(node.args) < 2:
            continue
        turned, rest = parts
        if not isinstance(turned, fx.Node) or turned.target is not torch.ops.llmopt.rope.default:
            continue
        head, cos = turned.args[0], turned.args[1]
        width = 2 * cos.meta["val"].shape[-1]  # type: ignore[union-attr]
        source = sliced(head, 0, width)
        if source is None or sliced(rest, width, None) is not source or node.args[1] not in (-1, 3):
            continue
        with graph.inserting_before(node):
            whole = graph.call_function(turned.target, (source, *turned.args[1:]))
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)


def sliced(node: object, start: int, stop: int | None) -> fx.Node | None:
    """The source of ``source[..., start:stop]`` (stop None: to the end), if the node is that slice."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice.Tensor or len(node.args) > 4:
        return None
    source, axis, low, high = slice_arguments(node)
    shape = source.meta["val"].shape
    size = shape[-1]
    ends = min(size, size if high is None else high) == (size if stop is None else stop)
    return source if axis in (-1, len(shape) - 1) and (low or 0) == start and ends else None
