"""fuse_qkv: one linear a layer, whatever lies between projection and attention."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.ir.module import Module
from tests.ir.handmade import Builder, aten, dialect, llama
from tests.passes.running import logits, rewrites, run, text


def one_layer(
    biases: str = "", norm: bool = False, shared: bool = False, fused: bool = False, sources: int = 1
) -> Module:
    """One attention layer: which projections have a bias, a norm a head, k's weight used twice, several inputs."""
    b = Builder()
    x = b.embed(16)
    b.scope = "layers.0.attn"
    inputs = [x if i < 3 - sources + 1 else b.call(aten.silu.default, x) for i in range(3)]
    if fused:
        q, k, v = b.split(aten.split_with_sizes.default, b.linear(x, "attn.qkv", 32), [16, 8, 8], -1)
    else:
        q, k, v = (b.linear(i, f"attn.{n}_proj", r, n in biases) for i, n, r in zip(inputs, "qkv", (16, 8, 8)))
    extra = b.linear(x, "attn.k_proj", 8) if shared else None
    q, k, v = b.heads(q, 4), b.heads(k, 2), b.heads(v, 2)
    if norm:
        q, k = b.rms_norm(q, "attn.q_norm"), b.call(aten.mul.Tensor, k, 0.5)
        q, k = (b.call(dialect.rope.default, t, *b.rotary(4), False) for t in (q, k))
    out = b.attention(q, k, v)
    out = out if extra is None else b.call(aten.cat.default, [out, extra], -1)
    return b.finish(b.linear(out, "head", 17))


@pytest.mark.parametrize("options", [{}, {"biases": "qkv"}, {"biases": "qv"}, {"norm": True}], ids=str)
def test_fires_and_numerics_unchanged(options: dict[str, object]) -> None:
    module = one_layer(**options)  # type: ignore[arg-type]
    before = logits(module)
    assert rewrites(module, "fuse_qkv") == 1
    torch.testing.assert_close(logits(module), before)
    assert module.weights["attn.qkv_proj.weight"].shape == (32, 16)
    assert "attn.q_proj.weight" not in module.weights


@pytest.mark.parametrize("options", [{"shared": True}, {"fused": True}, {"sources": 2}], ids=str)
def test_must_not_fire(options: dict[str, object]) -> None:
    module = one_layer(**options)  # type: ignore[arg-type]
    before = text(module)
    assert rewrites(module, "fuse_qkv") == 0
    assert text(module) == before


def test_every_layer_of_a_model() -> None:
    assert rewrites(llama(3), "fuse_qkv") == 3


def test_golden_text() -> None:
    module = one_layer(biases="q")
    run(module, "fuse_qkv")
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
) {
  #
  %embedding_0 : f32[1, T, 16] = aten.embedding(@embed.weight, %input_ids)
  # layers.0.attn
  %linear_0 : f32[1, T, 32] = aten.linear(%embedding_0, @attn.qkv_proj.weight, @attn.qkv_proj.bias)
  %split_with_sizes_0 : (f32[1, T, 16], f32[1, T, 8], f32[1, T, 8]) = aten.split_with_sizes(%linear_0, (16, 8, 8), -1)
  %sym_size_0 : T = aten.sym_size.int(%split_with_sizes_0.0, 1)
  %view_0 : f32[1, T, 4, 4] = aten.view(%split_with_sizes_0.0, (1, %sym_size_0, 4, 4))
  %transpose_0 : f32[1, 4, T, 4] = aten.transpose.int(%view_0, 1, 2)
  %sym_size_1 : T = aten.sym_size.int(%split_with_sizes_0.1, 1)
  %view_1 : f32[1, T, 2, 4] = aten.view(%split_with_sizes_0.1, (1, %sym_size_1, 2, 4))
  %transpose_1 : f32[1, 2, T, 4] = aten.transpose.int(%view_1, 1, 2)
  %sym_size_2 : T = aten.sym_size.int(%split_with_sizes_0.2, 1)
  %view_2 : f32[1, T, 2, 4] = aten.view(%split_with_sizes_0.2, (1, %sym_size_2, 2, 4))
  %transpose_2 : f32[1, 2, T, 4] = aten.transpose.int(%view_2, 1, 2)
  %attention_0 : f32[1, T, 4, 4] = llmopt.attention(%transpose_0, %transpose_1, %transpose_2, None, 0.5, 0, 0.0)
  %sym_size_3 : T = aten.sym_size.int(%attention_0, 1)
  %view_3 : f32[1, T, 16] = aten.view(%attention_0, (1, %sym_size_3, 16))
  %linear_1 : f32[1, T, 17] = aten.linear(%view_3, @head.weight)
  return (%linear_1)
}
""",
    )
