"""fuse_rope_kv_write: one op for both rotations and the write, only where they share a table."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.errors import PassError
from llmopt.ir.module import Module
from tests.ir.handmade import Builder, aten, dialect, llama
from tests.passes.running import logits, ops, rewrites, run, text


def layer(rotate_q: bool = True, rotate_k: bool = True, one_table: bool = True, k_used: bool = False) -> Module:
    """An attention layer with rope on some of q and k."""
    b = Builder()
    x, table = b.embed(8), b.rotary(4)
    other = table if one_table else b.rotary(4)
    q, k, v = (b.heads(b.linear(x, f"{n}_proj", 8), 2) for n in "qkv")
    q = b.call(dialect.rope.default, q, *table, False) if rotate_q else q
    k = b.call(dialect.rope.default, k, *other, False) if rotate_k else k
    out = b.attention(q, k, v)
    if k_used:
        merged = b.call(aten.reshape.default, b.call(aten.transpose.int, k, 1, 2), [1, -1, 8])
        out = b.call(aten.add.Tensor, out, merged)
    return b.finish(b.linear(out, "head", 17))


def test_fires_and_numerics_unchanged() -> None:
    module = llama(2, (0, 5))
    before = logits(module)
    assert rewrites(module, "rewrite_kv_cache", "fuse_rope_kv_write") == 2
    assert "llmopt.rope" not in ops(module)
    assert "llmopt.kv_write" not in ops(module)
    torch.testing.assert_close(logits(module, [9, 1, 13]), before)


@pytest.mark.parametrize(
    "options", [{"rotate_q": False}, {"rotate_k": False}, {"one_table": False}, {"k_used": True}], ids=str
)
def test_must_not_fire(options: dict[str, bool]) -> None:
    assert rewrites(layer(**options), "rewrite_kv_cache", "fuse_rope_kv_write") == 0


def test_needs_states() -> None:
    with pytest.raises(PassError, match="rewrite_kv_cache must come before fuse_rope_kv_write"):
        run(llama(1), "fuse_rope_kv_write")
    with pytest.raises(PassError, match="rewrite_kv_cache must come before fuse_rope_kv_write"):
        run(llama(1), "fuse_rope_kv_write", "rewrite_kv_cache")


def test_golden_text() -> None:
    module = layer()
    run(module, "rewrite_kv_cache", "fuse_rope_kv_write")
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
  %cu_seqlens : i32[N + 1],
  %seq_lens : i32[N],
  %block_table_paged : i32[N, W_paged],
  %slot_mapping_paged : i64[T],
  %k_0 : f32[B_paged, 2, 16, 4],
  %v_0 : f32[B_paged, 2, 16, 4],
) {
  #
  %embedding_0 : f32[1, T, 8] = aten.embedding(@embed.weight, %input_ids)
  %rotary_table_0 : (f32[1, T, 2], f32[1, T, 2]) = llmopt.rotary_table(%position_ids, @rotary.inv_freq, 1.0, None, 1.0, 0, None, f32)
  %linear_0 : f32[1, T, 8] = aten.linear(%embedding_0, @q_proj.weight)
  %sym_size_0 : T = aten.sym_size.int(%linear_0, 1)
  %view_0 : f32[1, T, 2, 4] = aten.view(%linear_0, (1, %sym_size_0, 2, 4))
  %transpose_0 : f32[1, 2, T, 4] = aten.transpose.int(%view_0, 1, 2)
  %linear_1 : f32[1, T, 8] = aten.linear(%embedding_0, @k_proj.weight)
  %sym_size_1 : T = aten.sym_size.int(%linear_1, 1)
  %view_1 : f32[1, T, 2, 4] = aten.view(%linear_1, (1, %sym_size_1, 2, 4))
  %transpose_1 : f32[1, 2, T, 4] = aten.transpose.int(%view_1, 1, 2)
  %linear_2 : f32[1, T, 8] = aten.linear(%embedding_0, @v_proj.weight)
  %sym_size_2 : T = aten.sym_size.int(%linear_2, 1)
  %view_2 : f32[1, T, 2, 4] = aten.view(%linear_2, (1, %sym_size_2, 2, 4))
  %transpose_2 : f32[1, 2, T, 4] = aten.transpose.int(%view_2, 1, 2)
  %rope_kv_write_0 : (f32[1, 2, T, 4], f32[B_paged, 2, 16, 4], f32[B_paged, 2, 16, 4]) = llmopt.rope_kv_write(%transpose_0, %transpose_1, %transpose_2, %rotary_table_0.0, %rotary_table_0.1, %k_0, %v_0, %slot_mapping_paged, False)
  %cached_attention_0 : f32[1, T, 2, 4] = llmopt.cached_attention(%rope_kv_write_0.0, %rope_kv_write_0.1, %rope_kv_write_0.2, %block_table_paged, %cu_seqlens, %seq_lens, None, 0.5, 0, 0.0, 0, False)
  %sym_size_3 : T = aten.sym_size.int(%cached_attention_0, 1)
  %view_3 : f32[1, T, 8] = aten.view(%cached_attention_0, (1, %sym_size_3, 8))
  %linear_3 : f32[1, T, 17] = aten.linear(%view_3, @head.weight)
  return (%linear_3, %rope_kv_write_0.1, %rope_kv_write_0.2)
}
""",  # noqa: E501
    )
