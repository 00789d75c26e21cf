"""Remembered fake values are those that computing each call gives; arguments that differ at all are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from llmopt.ir.interpret import run_module
from llmopt.ir.module import Module
from llmopt.ir.propagation import described
from llmopt.ir.text import print_module
from llmopt.ir.verify import refresh
from tests.ir.handmade import Builder, aten, llama
from tests.passes.running import FUSIONS, run


def types(module: Module) -> list[Any]:
    """Each node's name and what is known of its value."""
    return [(n.name, described(n.meta["val"])) for n in module.functions["step"].graph.nodes if n.op != "output"]


@pytest.mark.parametrize("layout", ["paged", "ring"])
def test_remembered_values_are_those_computed(layout: str) -> None:
    module = llama(2, (0, 5))
    options = {"layout": layout} | ({"max_chunk": 7} if layout == "ring" else {})
    run(module, *FUSIONS, ("rewrite_kv_cache", options), "fuse_rope_kv_write", "prune_logits")
    remembered, text = types(module), print_module(module)
    module.propagated.clear()
    refresh(module)
    assert (types(module), print_module(module)) == (remembered, text)


def test_layers_share_what_they_give() -> None:
    sizes = []
    for layers in (2, 3):
        module = llama(layers)
        refresh(module)
        sizes.append(len(module.propagated))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("before", "after", "dtype"), [(1, 1.0, torch.float32), (1, True, torch.int64)])
def test_numbers_that_are_equal_promote_by_their_types(before: Any, after: Any, dtype: torch.dtype) -> None:
    b = Builder()
    module = b.finish(b.call(aten.add.Tensor, b.positions, before))
    refresh(module)
    node = only(module, aten.add.Tensor)
    assert node.meta["val"].dtype == torch.int64
    node.update_arg(1, after)
    refresh(module)
    assert node.meta["val"].dtype == dtype


def test_a_call_with_other_arguments_is_computed_again() -> None:
    b = Builder()
    module = b.finish(b.call(aten.transpose.int, b.embed(8), 1, 2))
    refresh(module)
    node = only(module, aten.transpose.int)
    node.args = (node.args[0], 0, 1)
    refresh(module)
    given = {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "position_ids": torch.arange(5)[None]}
    assert run_module(module, "step", given)[0].shape == (5, 1, 8)
    assert [str(size) for size in node.meta["val"].shape][1:] == ["1", "8"]


def only(module: Module, target: Any) -> fx.Node:
    """The one call of an op."""
    (node,) = module.functions["step"].graph.find_nodes(op="call_function", target=target)
    return node
