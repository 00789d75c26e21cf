"""fuse_gated_activation: the halves must be halves, in this order."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.errors import PassError
from llmopt.ir.module import Module
from tests.ir.handmade import Builder, aten, llama
from tests.passes.running import logits, ops, rewrites, run, text

HALVES = {
    "split_with_sizes": lambda b, x: b.split(aten.split_with_sizes.default, x, [6, 6], -1),
    "split": lambda b, x: b.split(aten.split.Tensor, x, 6, 2),
    "chunk": lambda b, x: b.split(aten.chunk.default, x, 2, -1),
    "slice": lambda b, x: [b.call(aten.slice.Tensor, x, -1, i * 6, end) for i, end in enumerate((6, 2**63 - 1))],
}


def mlp(halves: str = "chunk", kind: str = "silu", swapped: bool = False, gate_first: bool = True) -> Module:
    """A gated MLP whose projection is already one linear."""
    b = Builder()
    fused = b.linear(b.embed(8), "gate_up_proj", 12)
    gate, up = HALVES[halves](b, fused) if gate_first else HALVES[halves](b, fused)[::-1]
    options = ("tanh",) if kind == "gelu_tanh" else ()
    node = b.function.graph.call_function(getattr(aten, kind.removesuffix("_tanh")).default, (gate,))
    if options:
        node.kwargs = {"approximate": "tanh"}
    node.meta["val"] = gate.meta["val"]
    hidden = b.call(aten.mul.Tensor, *((up, node) if swapped else (node, up)))
    return b.finish(b.linear(hidden, "down_proj", 17))


@pytest.mark.parametrize("halves", HALVES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("swapped", [False, True])
def test_fires_and_numerics_unchanged(halves: str, kind: str, swapped: bool) -> None:
    module = mlp(halves, kind, swapped)
    before = logits(module)
    assert rewrites(module, "fuse_gated_activation") == 1
    assert ops(module) == ["aten.embedding", "aten.linear", "llmopt.gated_activation", "aten.linear"]
    torch.testing.assert_close(logits(module), before)


@pytest.mark.parametrize("halves", HALVES)
def test_must_not_fire_on_up_gate(halves: str) -> None:
    assert rewrites(mlp(halves, gate_first=False), "fuse_gated_activation") == 0


def test_must_not_fire_on_uneven_parts() -> None:
    b = Builder()
    gate, up, _ = b.split(aten.split_with_sizes.default, b.linear(b.embed(8), "wide", 15), [6, 6, 3], -1)
    hidden = b.call(aten.mul.Tensor, b.call(aten.silu.default, gate), up)
    assert rewrites(b.finish(hidden), "fuse_gated_activation") == 0


def test_order_is_checked() -> None:
    with pytest.raises(PassError, match="fuse_gate_up must come before fuse_gated_activation"):
        run(llama(1), "fuse_gated_activation", "fuse_gate_up")


def test_golden_text() -> None:
    module = mlp(kind="gelu_tanh")
    run(module, "fuse_gated_activation")
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
) {
  #
  %embedding_0 : f32[1, T, 8] = aten.embedding(@embed.weight, %input_ids)
  %linear_0 : f32[1, T, 12] = aten.linear(%embedding_0, @gate_up_proj.weight)
  %gated_activation_0 : f32[1, T, 6] = llmopt.gated_activation(%linear_0, gelu_tanh)
  %linear_1 : f32[1, T, 17] = aten.linear(%gated_activation_0, @down_proj.weight)
  return (%linear_1)
}
""",
    )
