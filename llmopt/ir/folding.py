"""Moves a scale a channel from the input of linears and experts into their weights; its maker takes the inverse."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from llmopt.ir.module import Module
from llmopt.ir.rewrite import arguments, aten, dialect, is_weight, same_dim
from llmopt.ir.weights import Scaled, Weight

LINEAR, EXPERTS = aten.linear.default, dialect.moe_experts.default
COLUMNS = {LINEAR: 1, EXPERTS: 3}
"""Argument of a reader whose columns meet its first argument's channels."""
SPLITS = (aten.split_with_sizes.default, aten.split.Tensor)
GATES = (aten.silu.default, aten.gelu.default, aten.relu.default)
VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
# op: positions of weight and bias, of the offset added to the weight, and whether the input is its first result
NORMS = {
    dialect.rms_norm.default: (1, None, 3),
    aten.layer_norm.default: (2, 3, None),
    dialect.add_rms_norm.default: (2, None, 4),
    dialect.add_layer_norm.default: (2, 3, None),
}


@dataclass(frozen=True)
class Edit:
    """A weight argument of a call, ``rows`` of which take the factor; ``offset`` as in Scaled."""

    call: fx.Node
    slot: int
    start: int
    stop: int
    offset: float = 0.0


@dataclass(frozen=True)
class Folding:
    """How to scale the input of some calls: ``edits`` multiply what makes it, ``readers`` divide their columns.

    ``values``: the input and its views, which all change. ``heads``: (query heads, KV heads) when the input is
    attention's result. Query heads that share a KV head must then share their factors, as ``tie`` sees to.
    """

    edits: tuple[Edit, ...]
    readers: tuple[fx.Node, ...]
    values: tuple[fx.Node, ...]
    heads: tuple[int, int] | None = None

    def tie(self, factor: Tensor) -> Tensor:
        """Factors (K,) made equal, by their geometric mean, where they must be equal."""
        if self.heads is None:
            return factor
        queries, shared = self.heads
        logs = factor.log().reshape(shared, queries // shared, -1).mean(1, keepdim=True)
        return logs.expand(-1, queries // shared, -1).reshape(-1).exp()

    def apply(self, module: Module, function: fx.GraphModule, factor: Tensor) -> None:
        """Multiply the input by tied factors (K,) and divide the readers' columns by them."""
        made = factor
        if self.heads is not None:
            queries, shared = self.heads
            made = factor.reshape(shared, queries // shared, -1)[:, 0].reshape(-1)
        for edit in self.edits:
            rows = arguments(edit.call)[edit.slot].meta["val"].shape[0]
            full = torch.ones(rows)
            full[edit.start : edit.stop] = made
            swap(module, function, edit.call, edit.slot, partial(Scaled, axis=0, factor=full, offset=edit.offset))
        for reader in self.readers:
            swap(module, function, reader, COLUMNS[reader.target], partial(Scaled, axis=-1, factor=1 / factor))


def find_folding(source: fx.Node) -> Folding | None:
    """How the input of some calls can be scaled; None when something else reads it or its origin is no match.

    Origins: a norm with a weight; a linear; a gated product, through its ungated half; attention, through its values.
    """
    while (viewed := viewed_rows(source)) is not None:
        source = viewed
    readers: list[fx.Node] = []
    values = [source]
    for value in values:
        for user in readers_of(value):
            if viewed_rows(user) is value:
                values.append(user)
            elif not (user.target in COLUMNS and user.args[0] is value and is_weight(user.args[COLUMNS[user.target]])):
                return None
            else:
                readers.append(user)
    found = tuple(sorted(readers)), tuple(values)
    if (edits := norm_edits(source)) is not None:
        return Folding(edits, *found)
    attended = through_views(source)
    if attended.target is dialect.attention.default:
        values_of = attended.args[2]
        assert isinstance(values_of, fx.Node)
        edits = row_edits(values_of, attended)
        heads = (int(attended.meta["val"].shape[2]), int(values_of.meta["val"].shape[1]))
        return None if edits is None else Folding(edits, *found, heads)
    edits = product_edits(source)
    return None if edits is None else Folding(edits, *found)


def viewed_rows(node: fx.Node) -> fx.Node | None:
    """What a node views with all channels kept in the last dim; None when it is no such view."""
    source = node.args[0] if node.target in VIEWS else None
    if not isinstance(source, fx.Node):
        return None
    return source if same_dim(source.meta["val"].shape[-1], node.meta["val"].shape[-1]) else None


def norm_edits(node: fx.Node) -> tuple[Edit, ...] | None:
    """Edits that scale a normalization's result."""
    if node.target is operator.getitem and node.args[1] == 0 and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target not in NORMS:
        return None
    weight, bias, offset = NORMS[node.target]
    given = arguments(node)
    if not is_weight(given[weight]) or (bias is not None and given[bias] is not None and not is_weight(given[bias])):
        return None
    width = given[weight].meta["val"].shape[0]
    edits = [Edit(node, weight, 0, width, float(given[offset]) if offset is not None else 0.0)]
    if bias is not None and given[bias] is not None:
        edits.append(Edit(node, bias, 0, width))
    return tuple(edits)


def product_edits(node: fx.Node) -> tuple[Edit, ...] | None:
    """Edits that scale a linear's result, or the ungated half of a gated product."""
    if node.target is dialect.gated_activation.default:
        fused = node.args[0]
        width = int(node.meta["val"].shape[-1])
        return linear_edits(fused, node, width, 2 * width)
    if node.target is aten.mul.Tensor:
        for gate, up in (node.args[:2], node.args[1::-1]):
            if isinstance(gate, fx.Node) and gate.target in GATES and isinstance(up, fx.Node):
                return row_edits(up, node)
        return None
    return linear_edits(node, None, 0, int(node.meta["val"].shape[-1])) if node.target is LINEAR else None


def row_edits(value: fx.Node, user: fx.Node) -> tuple[Edit, ...] | None:
    """Edits that scale every channel of a value that only ``user`` reads and that is rows of one linear's result."""
    if readers_of(value) != [user]:
        return None
    if value.target is aten.transpose.int or value.target in VIEWS:
        source = value.args[0]
        assert isinstance(source, fx.Node)
        return row_edits(source, value) if keeps_channels(value, source) else None
    if value.target is operator.getitem:
        split, index = value.args
        assert isinstance(split, fx.Node)
        assert isinstance(index, int)
        if split.target not in SPLITS or arguments(split)[2] not in (-1, len(value.meta["val"].shape) - 1):
            return None
        sizes = [int(part.shape[-1]) for part in split.meta["val"]]
        start = sum(sizes[:index])
        return linear_edits(split.args[0], split, start, start + sizes[index])
    return linear_edits(value, user, 0, int(value.meta["val"].shape[-1]))


def linear_edits(value: object, user: fx.Node | None, start: int, stop: int) -> tuple[Edit, ...] | None:
    """Edits of rows of a linear that only ``user`` reads (None: whoever does)."""
    if not isinstance(value, fx.Node) or value.target is not LINEAR or (user and readers_of(value) != [user]):
        return None
    given = arguments(value)
    if not is_weight(given[1]) or not (given[2] is None or is_weight(given[2])):
        return None
    return tuple(Edit(value, slot, start, stop) for slot in (1, 2) if given[slot] is not None)


def readers_of(value: fx.Node) -> list[fx.Node]:
    """Calls that use a value's elements: its shape alone does not count."""
    return [user for user in value.users if user.target is not aten.sym_size.int]


def keeps_channels(view: fx.Node, source: fx.Node) -> bool:
    """Whether a view (1, T, C) → (1, T, H, D) or (1, T, H, D) → (1, H, T, D) keeps channels in the order h * D + d."""
    before, after = source.meta["val"].shape, view.meta["val"].shape
    if view.target is aten.transpose.int:
        return len(before) == 4 and set(view.args[1:]) == {1, 2}
    return len(before) == 3 and len(after) == 4 and int(after[2]) * int(after[3]) == int(before[2])


def through_views(node: fx.Node) -> fx.Node:
    """The attention a value (1, T, H * D) is a view of, else the value itself."""
    source = node.args[0] if node.args else None
    if node.target not in VIEWS or not isinstance(source, fx.Node) or len(readers_of(source)) > 1:
        return node
    shape = source.meta["val"].shape
    return source if len(shape) == 4 and shape[2] * shape[3] == node.meta["val"].shape[-1] else node


def swap(
    module: Module, function: fx.GraphModule, user: fx.Node, slot: int, change: Callable[[Weight], Weight]
) -> None:
    """Change one weight argument of a call: in the table when nothing else reads it, else as ``<name>.scaled``."""
    node = user.args[slot]
    assert isinstance(node, fx.Node)
    name = str(node.target)
    changed = change(module.weights[name])
    readers = [n for f in module.functions.values() for n in f.graph.find_nodes(op="get_attr", target=name)]
    if len(readers) == 1 and len(node.users) == 1:
        module.weights[name] = changed
        return
    fresh = f"{name}.scaled"
    while fresh in module.weights:
        fresh += "+"
    user.update_arg(slot, module.weight_node(function, fresh, changed))
