"""Buffers filled slice by slice (DeepSeek's keys) become one concatenation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
EMPTIES = {aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default}


def fold_fills(graph: fx.Graph) -> None:
    """Matches empty; copy_(empty[a:b] on one axis, x) until it is full. Replaces with cat(x, …)."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in EMPTIES:
            fills = pieces(node)
            if fills is not None:
                fold_fill(graph, node, fills, order)


def pieces(buffer: fx.Node) -> list[tuple[int, int, fx.Node, fx.Node]] | None:
    """(start, stop, slice, copy) of each write, in order along one axis, if they fill the buffer exactly."""
    shape = buffer.meta["val"].shape
    found: list[tuple[int, int, fx.Node, fx.Node]] = []
    axes: set[int] = set()
    for view in buffer.users:
        writes = [user for user in view.users if user.target is aten.copy_.default and user.args[0] is view]
        if view.target is aten.slice.Tensor and len(writes) == len(view.users) == 1 and len(view.args) <= 4:
            _, axis, start, stop = slice_arguments(view)
            axis %= len(shape)
            if not all(isinstance(n, int | None) for n in (start, stop)) or not isinstance(shape[axis], int):
                return None
            axes.add(axis)
            found.append((int(start or 0), min(shape[axis], shape[axis] if stop is None else stop), view, writes[0]))
    found.sort(key=lambda piece: piece[0])
    edges = [0, *(stop for _, stop, _, _ in found)]
    whole = len(axes) == 1 and edges[-1] == shape[next(iter(axes))]
    return found if whole and edges[:-1] == [start for start, *_ in found] else None


def fold_fill(graph: fx.Graph, buffer: fx.Node, fills: list[Any], order: dict[fx.Node, int]) -> None:
    """Replace a filled buffer, unless something reads it before the last write."""
    views = {view for _, _, view, _ in fills}
    last = max((write for *_, write in fills), key=lambda write: order[write])
    readers = [user for user in buffer.users if user not in views]
    if any(order[reader] < order[last] for reader in readers) or any(write.users for *_, write in fills):
        return
    if any(not same_shape(write.args[1], view) for _, _, view, write in fills):
        return
    axis = slice_arguments(next(iter(views)))[1] % buffer.meta["val"].dim()
    with graph.inserting_after(last):
        joined = graph.call_function(aten.cat.default, ([write.args[1] for *_, write in fills], axis))
    joined.meta = {"val": buffer.meta["val"], "scope": last.meta.get("scope", "")}
    for reader in readers:
        reader.replace_input_with(buffer, joined)
    for _, _, view, write in fills:
        graph.erase_node(write)
        graph.erase_node(view)


def slice_arguments(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """(source, axis, start, stop) of an aten.slice with its defaults."""
    given = dict(enumerate(node.args))
    return given[0], given.get(1, 0), given.get(2), given.get(3)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have the same symbolic shape and dtype."""
    x, y = a.meta["val"], b.meta["val"]
    return bool(x.dtype == y.dtype and tuple(map(str, x.shape)) == tuple(map(str, y.shape)))
