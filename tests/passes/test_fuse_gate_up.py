"""fuse_gate_up: gate rows first, whichever factor carries the activation."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.ir.module import Module
from tests.ir.handmade import Builder, aten
from tests.passes.running import logits, rewrites, run, text


def mlp(act: str = "silu", swapped: bool = False, product: bool = True, same_input: bool = True) -> Module:
    """A gated MLP, or something close to one."""
    b = Builder()
    x = b.embed(8)
    b.scope = "mlp"
    gate = b.call(getattr(aten, act).default, b.linear(x, "mlp.gate_proj", 12))
    up = b.linear(x if same_input else b.call(aten.tanh.default, x), "mlp.up_proj", 12)
    factors = (up, gate) if swapped else (gate, up)
    hidden = b.call(aten.mul.Tensor if product else aten.add.Tensor, *factors)
    return b.finish(b.linear(hidden, "mlp.down_proj", 17))


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("swapped", [False, True])
def test_fires_and_numerics_unchanged(act: str, swapped: bool) -> None:
    module = mlp(act, swapped)
    gate = module.weights["mlp.gate_proj.weight"].tensor()
    before = logits(module)
    assert rewrites(module, "fuse_gate_up") == 1
    torch.testing.assert_close(logits(module), before)
    torch.testing.assert_close(module.weights["mlp.gate_up_proj.weight"].read(0, 12), gate)


@pytest.mark.parametrize("options", [{"product": False}, {"same_input": False}, {"act": "tanh"}], ids=str)
def test_must_not_fire(options: dict[str, object]) -> None:
    assert rewrites(mlp(**options), "fuse_gate_up") == 0  # type: ignore[arg-type]


def test_golden_text() -> None:
    module = mlp()
    run(module, "fuse_gate_up")
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
) {
  #
  %embedding_0 : f32[1, T, 8] = aten.embedding(@embed.weight, %input_ids)
  # mlp
  %linear_0 : f32[1, T, 24] = aten.linear(%embedding_0, @mlp.gate_up_proj.weight)
  %split_with_sizes_0 : (f32[1, T, 12], f32[1, T, 12]) = aten.split_with_sizes(%linear_0, (12, 12), -1)
  %silu_0 : f32[1, T, 12] = aten.silu(%split_with_sizes_0.0)
  %mul_0 : f32[1, T, 12] = aten.mul.Tensor(%silu_0, %split_with_sizes_0.1)
  %linear_1 : f32[1, T, 17] = aten.linear(%mul_0, @mlp.down_proj.weight)
  return (%linear_1)
}
""",
    )
