"""The pattern matcher, typed insertion and symbolic dims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from llmopt.ir.rewrite import (
    Op,
    Var,
    arguments,
    call,
    is_weight,
    item,
    match,
    new_dim,
    rewrite,
    same_dim,
    same_shape,
    sweep,
)
from tests.ir.handmade import Builder, aten


def gated() -> tuple[Builder, fx.Node, fx.Node, fx.Node]:
    """silu(x) * tanh(x)."""
    b = Builder()
    x = b.embed(8)
    silu, tanh = b.call(aten.silu.default, x), b.call(aten.tanh.default, x)
    return b, x, silu, b.call(aten.mul.Tensor, tanh, silu)


def pattern(**options: Any) -> Op:
    """silu(x) * tanh(x)."""
    return Op((aten.mul.Tensor,), (Op((aten.silu.default,), (Var("x"),), name="silu"), Op((aten.tanh.default,), (Var("x"),))), **options)  # fmt: skip  # noqa: E501


def test_commuting_operands_bind_by_name() -> None:
    _, x, silu, mul = gated()
    assert match(pattern(commutes=True, name="mul"), mul) == {"x": x, "silu": silu, "mul": mul}
    assert match(pattern(), mul) is None


def test_one_name_is_one_value() -> None:
    b, x, silu, _ = gated()
    other = b.call(aten.tanh.default, b.call(aten.relu.default, x))
    assert match(pattern(), b.call(aten.mul.Tensor, silu, other)) is None


def test_inner_nodes_belong_to_the_match_alone() -> None:
    b, _, silu, mul = gated()
    b.call(aten.relu.default, silu)
    assert match(pattern(commutes=True), mul) is None
    shared = Op((aten.mul.Tensor,), (Var("y"), Op((aten.silu.default,), (Var("x"),), only_use=False)))
    assert match(shared, mul) is not None


def test_predicates_constants_and_defaults() -> None:
    b, x, _, _ = gated()
    plain = b.call(aten.gelu.default, x)
    assert arguments(plain) == [x, "none"]
    assert match(Op((aten.gelu.default,), (Var("x"), "none")), plain) is not None
    assert match(Op((aten.gelu.default,), (Var("x"), "tanh")), plain) is None
    assert match(Op((aten.gelu.default,), (Var("x", is_weight),)), plain) is None


def test_items_of_several_results() -> None:
    b, x, _, _ = gated()
    first, second = b.split(aten.chunk.default, x, 2, -1)
    chunked = Op((aten.chunk.default,), (Var("x"),), only_use=False)
    assert match(item(chunked, 0), first) == {"x": x}
    assert match(item(chunked, 0), second) is None


def test_rewrite_replaces_and_sweeps() -> None:
    b, _, _, mul = gated()
    module = b.finish(b.linear(mul, "head", 17))

    def to_relu(root: fx.Node, found: dict[str, Any]) -> fx.Node:
        return call(b.function, module, aten.relu.default, found["x"], like=root)

    assert rewrite(b.function, pattern(commutes=True), to_relu) == 1
    assert [n.target for n in b.function.graph.nodes if n.op == "call_function"][1:2] == [aten.relu.default]
    assert rewrite(b.function, pattern(commutes=True), to_relu) == 0
    assert rewrite(b.function, Op((aten.relu.default,), (Var("x"),)), lambda root, found: None) == 0


def test_call_types_the_node() -> None:
    b, x, _, _ = gated()
    b.scope = "here"
    node = call(b.function, b.module, aten.linear.default, x, b.weight("w", 3, 8), like=b.call(aten.relu.default, x))
    assert same_shape(node.meta["val"], b.module.fake((1, x.meta["val"].shape[1], 3), torch.float32))
    assert node.meta["scope"] == "here"
    with pytest.raises(RuntimeError):
        call(b.function, b.module, aten.linear.default, x, b.weight("v", 3, 7))


def test_dims_are_equal_only_when_always_equal() -> None:
    b, x, _, _ = gated()
    rows = x.meta["val"].shape[1]
    other = new_dim(b.module, "N", 1, 8)
    assert same_dim(rows, rows)
    assert not same_dim(rows, other)
    assert not same_dim(rows, 9), "9 is the example size of T"
    assert same_dim(4, 4)
    assert b.module.dims["N"] == (1, 8)
    assert not isinstance(rows.node.expr, int), "comparing makes no guard"


def test_sweep_keeps_inputs() -> None:
    b, x, _, _ = gated()
    module = b.finish(b.linear(x, "head", 17))
    b.weight("unused", 3)
    sweep(b.function)
    assert [n.name for n in b.function.graph.nodes if n.op == "placeholder"] == ["input_ids", "position_ids"]
    assert not [n for n in b.function.graph.nodes if n.op == "get_attr" and n.target == "unused"]
    assert "unused" in module.weights
