"""Fusions over linears that run on codes: fire for one scheme, never across schemes or orders of columns."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from llmopt.ir.module import Module
from llmopt.ir.rewrite import dialect, sweep
from llmopt.ir.weights import Constant
from tests.ir.handmade import llama
from tests.passes.running import logits, rewrites, run


def quantized(*bits_of: tuple[str, int]) -> Module:
    """A handmade Llama of one layer on 8-bit codes with zero points, but those the patterns give other bits."""
    module = llama(1)
    for pattern, bits in bits_of:
        run(module, ("quantize_weights", {"bits": bits, "symmetric": False, "include": [pattern]}))
    run(module, ("quantize_weights", {"symmetric": False}))
    return module


def linears(module: Module) -> list[fx.Node]:
    return list(module.functions["step"].graph.find_nodes(op="call_function", target=dialect.linear_q.default))


@pytest.mark.parametrize(("name", "saved"), [("fuse_qkv", 2), ("fuse_gate_up", 1)])
def test_fires_and_numerics_unchanged(name: str, saved: int) -> None:
    module = quantized()
    before, count = logits(module), len(linears(module))
    assert rewrites(module, name) == 1
    assert len(linears(module)) == count - saved
    torch.testing.assert_close(logits(module), before)
    stem = next(n for n in module.weights if n.endswith(f"{name.removeprefix('fuse_')}_proj.weight.codes"))
    assert stem.removesuffix(".codes") in module.originals


def test_must_not_fire_across_schemes() -> None:
    module = quantized(("*k_proj", 4))
    assert rewrites(module, "fuse_qkv") == 0


@pytest.mark.parametrize("same", [True, False])
def test_order_of_columns(same: bool) -> None:
    """Linears with a g_idx each, over two groups of columns, stack when it is one order."""
    module = quantized()
    function = module.functions["step"]
    for i, node in enumerate(linears(module)[:3]):
        codes, scales, zeros = (module.weights[str(arg.target)].tensor() for arg in node.args[1:4])  # type: ignore[union-attr]
        seed = torch.Generator().manual_seed(0 if same else i)
        index = torch.randperm(codes.shape[1], generator=seed).int() % 2
        two_groups = {2: torch.cat((scales, 2 * scales), 1), 3: zeros.repeat(1, 2), 5: index}
        for slot, value in two_groups.items():
            node.update_arg(slot, module.weight_node(function, f"part{slot}.{i}", Constant(value)))
        node.update_arg(9, codes.shape[1] // 2)
    sweep(function)
    before = logits(module)
    assert rewrites(module, "fuse_qkv") == int(same)
    torch.testing.assert_close(logits(module), before)
