"""fuse_add_norm: RMS and layer norms of a sum; nothing that broadcasts, nothing that is normed before the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from llmopt.ir.module import Module
from tests.ir.handmade import Builder, aten
from tests.passes.running import logits, ops, rewrites, run, text


def layer_norm(b: Builder, x: fx.Node, name: str, weight: bool = True, bias: bool = True) -> fx.Node:
    """aten.layer_norm over the last axis."""
    given = [b.weight(f"{name}.weight", 8) if weight else None, b.weight(f"{name}.bias", 8) if bias else None]
    return b.call(aten.layer_norm.default, x, [8], *given, 1e-5)


NORMS: dict[str, Any] = {
    "rms": lambda b, x: b.rms_norm(x, "norm"),
    "gemma": lambda b, x: b.rms_norm(x, "norm", offset=1.0, mul_in_fp32=True),
    "layer": lambda b, x: layer_norm(b, x, "norm"),
    "plain layer": lambda b, x: layer_norm(b, x, "norm", weight=False, bias=False),
}


def residual(norm: str = "rms", twice: bool = False) -> Module:
    """x + linear(x), normed, with the sum used again; ``twice``: under a second norm as well."""
    b = Builder()
    x = b.embed(8)
    total = b.call(aten.add.Tensor, x, b.linear(x, "proj", 8))
    normed = NORMS[norm](b, total)
    other = b.rms_norm(total, "second") if twice else total
    return b.finish(b.linear(b.call(aten.add.Tensor, other, b.linear(normed, "mlp", 8)), "head", 17))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("twice", [False, True])
def test_fires_and_numerics_unchanged(norm: str, twice: bool) -> None:
    module = residual(norm, twice)
    before = logits(module)
    assert rewrites(module, "fuse_add_norm") == 1
    torch.testing.assert_close(logits(module), before)


def broadcasting() -> Module:
    b = Builder()
    return b.finish(b.rms_norm(b.call(aten.add.Tensor, b.embed(8), b.weight("bias", 8)), "norm"))


def scaled() -> Module:
    b = Builder()
    x = b.embed(8)
    node = b.function.graph.call_function(aten.add.Tensor, (x, b.linear(x, "proj", 8)), {"alpha": 2})
    node.meta["val"] = x.meta["val"]
    return b.finish(b.rms_norm(node, "norm"))


def post_norm() -> Module:
    """OLMo2: the norm comes before the sum."""
    b = Builder()
    x = b.embed(8)
    return b.finish(b.linear(b.call(aten.add.Tensor, x, b.rms_norm(b.linear(x, "proj", 8), "norm")), "head", 17))


def two_axes() -> Module:
    b = Builder()
    x = b.call(aten.unflatten.int, b.embed(8), 2, [2, 4])
    total = b.call(aten.add.Tensor, x, b.call(aten.tanh.default, x))
    return b.finish(b.call(aten.layer_norm.default, total, [2, 4], None, None, 1e-5))


@pytest.mark.parametrize("make", [broadcasting, scaled, post_norm, two_axes])
def test_must_not_fire(make: Any) -> None:
    assert rewrites(make(), "fuse_add_norm") == 0


def test_gemma2_fuses_only_the_norm_after_the_sum() -> None:
    b = Builder()
    x = b.embed(8)
    total = b.call(aten.add.Tensor, x, b.rms_norm(b.linear(x, "proj", 8), "post", offset=1.0))
    module = b.finish(b.linear(b.rms_norm(total, "pre", offset=1.0), "head", 17))
    before = logits(module)
    assert rewrites(module, "fuse_add_norm") == 1
    assert ops(module)[-3:] == ["llmopt.rms_norm", "llmopt.add_rms_norm", "aten.linear"]
    torch.testing.assert_close(logits(module), before)


def test_golden_text() -> None:
    module = residual("layer", twice=True)
    run(module, "fuse_add_norm")
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
) {
  #
  %embedding_0 : f32[1, T, 8] = aten.embedding(@embed.weight, %input_ids)
  %linear_0 : f32[1, T, 8] = aten.linear(%embedding_0, @proj.weight)
  %add_layer_norm_0 : (f32[1, T, 8], f32[1, T, 8]) = llmopt.add_layer_norm(%linear_0, %embedding_0, @norm.weight, @norm.bias, 1e-05)
  %rms_norm_0 : f32[1, T, 8] = llmopt.rms_norm(%add_layer_norm_0.1, @second.weight, 1e-05, 1.0, False)
  %linear_1 : f32[1, T, 8] = aten.linear(%add_layer_norm_0.0, @mlp.weight)
  %add_0 : f32[1, T, 8] = aten.add.Tensor(%rms_norm_0, %linear_1)
  %linear_2 : f32[1, T, 17] = aten.linear(%add_0, @head.weight)
  return (%linear_2)
}
""",  # noqa: E501
    )
