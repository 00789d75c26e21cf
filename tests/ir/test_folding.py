"""Folding a scale into linears: exact for every origin, refused where something else reads the input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from llmopt.ir.folding import find_folding
from llmopt.ir.module import Module
from llmopt.ir.rewrite import arguments
from tests.calibration.running import mlp
from tests.ir.handmade import Builder, aten, dialect, llama
from tests.passes.running import FUSIONS, logits, run

LINEAR = aten.linear.default


def inputs(module: Module) -> list[fx.Node]:
    """Distinct inputs of the linears, in order."""
    linears = module.functions["step"].graph.find_nodes(op="call_function", target=LINEAR)
    return list(dict.fromkeys(node.args[0] for node in linears))


def fold_all(module: Module, wrong: bool = False) -> int:
    """Scale every input that can be by factors of 1/8 to 8; ``wrong`` leaves ties out."""
    count = 0
    for index, source in enumerate(inputs(module)):
        folding = find_folding(source)
        if folding is None:
            continue
        width = int(source.meta["val"].shape[-1])
        factor = torch.exp2(torch.rand(width, generator=torch.Generator().manual_seed(index)) * 6 - 3)
        folding.apply(module, module.functions["step"], factor if wrong else folding.tie(factor))
        count += 1
    return count


def gpt_like() -> Module:
    """LayerNorm with bias, biased linears, no gate."""
    b = Builder()
    x = b.embed(32)
    weight, bias = b.weight("norm.weight", 32), b.weight("norm.bias", 32)
    h = b.call(aten.layer_norm.default, x, [32], weight, bias, 1e-5, False)
    h = b.linear(b.linear(h, "up", 64, bias=True), "down", 32, bias=True)
    return b.finish(b.linear(h, "lm_head", 17))


def gemma_norm() -> Module:
    """A norm that adds one to its weight."""
    b = Builder()
    h = b.call(dialect.rms_norm.default, b.embed(32), b.weight("norm.weight", 32), 1e-6, 1.0, True)
    return b.finish(b.linear(h, "lm_head", 17))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("make", "count"),
    [(lambda: llama(2), 9), (mlp, 5), (gpt_like, 3), (gemma_norm, 1)],
    ids=["llama", "mlp", "gpt", "gemma"],
)
def test_folding_changes_no_logit(make: Any, count: int, fused: bool) -> None:
    module = make()
    if fused:
        run(module, *FUSIONS)
    exact = logits(module)
    before = dict(module.weights)
    assert fold_all(module) == count
    assert sum(module.weights[name] is not weight for name, weight in before.items()) >= count
    torch.testing.assert_close(logits(module), exact, rtol=1e-4, atol=1e-5)


def test_query_heads_of_one_kv_head_must_share_their_factors() -> None:
    module = llama(1)
    exact = logits(module)
    fold_all(module, wrong=True)
    assert float((logits(module) - exact).abs().max()) > 1e-2


def test_an_input_something_else_reads_is_left_alone() -> None:
    b = Builder()
    h = b.rms_norm(b.embed(32), "norm")
    y = b.linear(h, "a", 32)
    module = b.finish(b.linear(b.call(aten.add.Tensor, y, h), "lm_head", 17))
    assert [find_folding(source) is None for source in inputs(module)] == [True, True]


def test_a_weight_two_norms_share_is_scaled_for_one_of_them() -> None:
    b = Builder()
    x, weight = b.embed(32), b.weight("norm.weight", 32)
    y = b.linear(b.call(dialect.rms_norm.default, x, weight, 1e-6, 0.0, False), "a", 32)
    z = b.linear(b.call(dialect.rms_norm.default, y, weight, 1e-6, 0.0, False), "b", 32)
    module = b.finish(b.linear(z, "lm_head", 17))
    exact = logits(module)
    fold_all(module)
    torch.testing.assert_close(logits(module), exact, rtol=1e-4, atol=1e-5)
    norms = module.functions["step"].graph.find_nodes(op="call_function", target=dialect.rms_norm.default)
    assert len({arguments(n)[1].target for n in norms}) == 2
