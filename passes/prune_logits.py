"""Computes logits, and what only they need, for the wanted rows instead of all."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import arguments, aten, call, dialect, new_dim, placeholder, same_dim

ELEMENTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.silu.default,
    aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.neg.default, aten.pow.Tensor_Scalar,
    aten._to_copy.default, aten.to.dtype, aten.contiguous.default, aten.clone.default, operator.getitem,
}  # fmt: skip
LAST_AXIS = {
    aten.linear.default, dialect.linear_q.default, dialect.rms_norm.default, dialect.add_rms_norm.default,
    dialect.add_layer_norm.default, dialect.gated_activation.default, dialect.round_activations.default,
}  # fmt: skip
SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default}


@dataclass(frozen=True)
class PruneLogits(Pass):
    """Matches the row-wise ops (linears, norms, activations, sums) whose results only the logits (1, T, V) need.

    Replaces what they read with ``index_select(x, 1, logit_rows)``, so that LM head, final norm and the last
    layer's MLP run on the M wanted rows. Adds the input ``logit_rows`` (M,) int64.
    """

    name: ClassVar[str] = "prune_logits"

    def requires(self, module: Module, ctx: PassContext) -> None:
        """Logits not yet pruned; the pass serves every function."""
        if any(n.name == "logit_rows" for f in module.functions.values() for n in f.graph.nodes):
            raise PassError("the logits are already pruned", where="pass prune_logits")

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a function."""
        functions = list(self.served(module))
        wanted = new_dim(module, "M", 0, module.dims["T"][1])
        for function in functions:
            prune(module, function, wanted)
        return len(functions)


def prune(module: Module, function: fx.GraphModule, wanted: torch.SymInt) -> None:
    """Select the wanted rows where the row-wise tail of the function begins."""
    inputs = {n.name: n for n in function.graph.nodes if n.op == "placeholder"}
    rows = inputs["input_ids"].meta["val"].shape[1]
    after = next(inputs[n] for n in ("rope_lens", "seq_lens", "position_ids") if n in inputs)
    index = placeholder(function, after, "logit_rows", module.fake((wanted,), torch.int64))
    output = next(n for n in function.graph.nodes if n.op == "output")
    tail = row_wise_tail(output, rows)
    selected: dict[fx.Node, fx.Node] = {}

    def select(source: fx.Node, before: fx.Node) -> fx.Node:
        if source not in selected:
            with function.graph.inserting_before(before):
                selected[source] = call(function, module, aten.index_select.default, source, 1, index, like=source)
        return selected[source]

    for node in [n for n in function.graph.nodes if n in tail]:
        for source in node.all_input_nodes:
            if source not in tail and has_rows(source, rows):
                node.replace_input_with(source, select(source, node))
    logits, *others = outputs_of(output)
    if logits not in tail:
        output.args = ((select(logits, output), *others),)


def outputs_of(output: fx.Node) -> list[Any]:
    """The nodes a function returns."""
    return list(output.args[0])  # type: ignore[arg-type]


def row_wise_tail(output: fx.Node, rows: torch.SymInt) -> set[fx.Node]:
    """Row-wise nodes all of whose users lead to the logits alone (empty when the logits themselves are not)."""
    logits, *others = outputs_of(output)
    tail: set[fx.Node] = set()
    for node in reversed(output.graph.nodes):
        users = set(node.users) - ({output} if node is logits and node not in others else set())
        leads_there = node is logits or bool(users)
        if leads_there and users <= tail and is_row_wise(node, rows):
            tail.add(node)
    # one result of a call whose other result is wanted for all rows
    return {n for n in tail if n.target is not operator.getitem or n.args[0] in tail}


def is_row_wise(node: fx.Node, rows: torch.SymInt) -> bool:
    """Whether row t of the results (1, T, …) depends on row t of the inputs (1, T, …) and on constants only."""
    if node.target in SPLITS or node.target is aten.layer_norm.default:
        rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        if node.target in SPLITS and arguments(node)[2] not in (-1, rank - 1):
            return False
        if node.target is aten.layer_norm.default and len(arguments(node)[1]) > 1:
            return False
    elif node.target not in ELEMENTWISE | LAST_AXIS:
        return False
    return has_rows(node, rows) and all(has_rows(n, rows) or is_constant(n) for n in node.all_input_nodes)


def has_rows(node: fx.Node, rows: torch.SymInt) -> bool:
    """Whether the node's value is a tensor (1, T, C), or several."""
    value: Any = node.meta["val"]
    items = value if isinstance(value, tuple | list) else [value]
    return all(
        isinstance(t, torch.Tensor) and t.dim() == 3 and same_dim(t.shape[0], 1) and same_dim(t.shape[1], rows)
        for t in items
    )


def is_constant(node: fx.Node) -> bool:
    """Whether the node's value is a tensor of fixed shape: it broadcasts over rows."""
    value: Any = node.meta["val"]
    return isinstance(value, torch.Tensor) and not any(isinstance(d, torch.SymInt) for d in value.shape)


PASS = PruneLogits
