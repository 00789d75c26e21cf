"""rewrite_kv_cache: every layout gives the captured attention, in any cut into steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.errors import ConfigError, PassError
from llmopt.ir.pass_manager import PassContext, PassManager
from llmopt.ir.tolerance import row_error, tolerance
from llmopt.recipe import build_pass
from llmopt.target import TargetInfo
from tests.ir.handmade import Builder, dialect, llama
from tests.passes.running import TOKENS, logits, rewrites, run, text

LAYOUTS: dict[str, dict[str, Any]] = {
    "paged": {},
    "paged 4": {"block_size": 4},
    "slots": {"layout": "slots"},
    "ring": {"layout": "ring", "max_chunk": 6},
    "ring, slots": {"layout": "ring", "max_chunk": 6, "full_layout": "slots"},
}
CHUNKS = {"one prefill": None, "chunks": [6, 6, 6, 5], "decode": [5, *[1] * 18], "mixed": [4, 1, 6, 1, 3, 6, 1, 1]}
WINDOWS = (0, 5, 7)
BOUND = tolerance(torch.float32, 64, depth=6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", CHUNKS)
def test_numerics_unchanged(layout: str, cut: str) -> None:
    if layout.startswith("ring") and cut == "one prefill":
        pytest.skip("a ring takes max_chunk rows a step")
    module = llama(3, WINDOWS)
    before = logits(module)
    assert rewrites(module, ("rewrite_kv_cache", LAYOUTS[layout])) == 3
    assert row_error(logits(module, CHUNKS[cut]), before) < BOUND


def test_longer_chunks_than_the_ring_keeps_show() -> None:
    """Negative control of the test above: past max_chunk the ring has lost keys."""
    module = llama(3, WINDOWS)
    before = logits(module)
    run(module, ("rewrite_kv_cache", {"layout": "ring", "max_chunk": 1}))
    assert row_error(logits(module, [12, 11]), before) > 100 * BOUND


def test_groups() -> None:
    module = llama(4, (0, 5, 7, 5))
    run(module, ("rewrite_kv_cache", {"layout": "ring", "max_chunk": 3}))
    found = {g.name: (g.kind, g.block_size, [s.input for s in g.states], g.truncatable) for g in module.states}
    assert found == {
        "paged": ("paged", 16, ["k_0", "v_0"], True),
        "ring_w5": ("ring", 7, ["k_1", "v_1", "k_3", "v_3"], False),
        "ring_w7": ("ring", 9, ["k_2", "v_2"], False),
    }


def test_a_window_as_long_as_the_context_is_no_ring() -> None:
    module = llama(1, (64,))
    run(module, ("rewrite_kv_cache", {"layout": "ring"}))
    assert [g.name for g in module.states] == ["paged"]


def test_sinks_keep_the_first_tokens_visible() -> None:
    module, plain = llama(2, (5, 5)), llama(2, (5, 5))
    run(module, ("rewrite_kv_cache", {"layout": "ring", "max_chunk": 6, "sinks": 2}))
    expected = logits(plain)
    found = logits(module, [6, 6, 6, 5])
    torch.testing.assert_close(found[:5], expected[:5])
    assert row_error(found[8:], expected[8:]) > 0.01
    # what they show is the first tokens: the same as full attention masked by hand
    for node in plain.functions["step"].graph.find_nodes(op="call_function", target=dialect.attention.default):
        node.target = with_sinks
    torch.testing.assert_close(found, logits(plain))


def with_sinks(q: Any, k: Any, v: Any, sinks: Any, scale: float, window: int, softcap: float) -> torch.Tensor:
    """Windowed attention that also sees the first two tokens, by brute force."""
    rows = torch.arange(q.shape[2])
    distance = rows[:, None] - rows[None]
    mask = (distance >= 0) & ((distance < window) | (rows[None] < 2))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


def longrope() -> Any:
    """A layer whose rotary table changes past 8 tokens."""
    b = Builder()
    x = b.embed(16)
    short, long = b.weight("rotary.inv_freq", 2), b.weight("rotary.inv_freq_long", 2)
    cos, sin = b.split(dialect.rotary_table.default, b.positions, short, 1.0, long, 1.2, 8, None, torch.float32)
    q, k, v = (b.heads(b.linear(x, f"{n}_proj", 8), 2) for n in "qkv")
    q, k = (b.call(dialect.rope.default, t, cos, sin, False) for t in (q, k))
    return b.finish(b.linear(b.attention(q, k, v), "head", 17))


def test_longrope_takes_lengths() -> None:
    module = longrope()
    long, short = logits(module), logits(module, tokens=TOKENS[:8])
    run(module, "rewrite_kv_cache")
    inputs = [n.name for n in module.functions["step"].graph.nodes if n.op == "placeholder"]
    assert inputs[:5] == ["input_ids", "position_ids", "cu_seqlens", "seq_lens", "rope_lens"]
    assert module.rope_switch == 8
    assert row_error(logits(module, [6, 6, 11]), long) < BOUND
    assert row_error(logits(module, [6, 2], TOKENS[:8]), short) < BOUND
    assert row_error(long[:8], short) > 0.01, "the two tables must differ for this test to mean anything"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": 2}, "sinks belongs to layout ring"),
        ({"layout": "slots", "block_size": 4}, "block_size belongs to the paged layout"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"layout": "rings"}, "Input should be 'paged', 'slots' or 'ring'"),
        ({"block": 4}, "did you mean 'block_size'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pass("rewrite_kv_cache", options)


def test_requires() -> None:
    module = llama(1)
    with pytest.raises(PassError, match="sinks need layers with an attention window"):
        run(module, ("rewrite_kv_cache", {"layout": "ring", "sinks": 2}))
    slots_only = PassContext(TargetInfo("t", layouts=("slots",)), torch.float32)
    with pytest.raises(PassError, match="target t cannot run layout paged"):
        PassManager().run(module, [build_pass("rewrite_kv_cache")], slots_only)
    run(module, "rewrite_kv_cache")
    with pytest.raises(PassError, match="already has KV states"):
        run(module, "rewrite_kv_cache")


def test_golden_text() -> None:
    b = Builder()
    x = b.embed(8)
    q, k, v = (b.heads(b.linear(x, f"{n}_proj", 8), 2) for n in "qkv")
    module = b.finish(b.linear(b.attention(q, k, v, window=5), "head", 17))
    run(module, ("rewrite_kv_cache", {"layout": "ring", "max_chunk": 4}))
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
  %cu_seqlens : i32[N + 1],
  %seq_lens : i32[N],
  %block_table_ring_w5 : i32[N, W_ring_w5],
  %slot_mapping_ring_w5 : i64[T],
  %k_0 : f32[B_ring_w5, 2, 8, 4],
  %v_0 : f32[B_ring_w5, 2, 8, 4],
) {
  #
  %embedding_0 : f32[1, T, 8] = aten.embedding(@embed.weight, %input_ids)
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
  %kv_write_0 : (f32[B_ring_w5, 2, 8, 4], f32[B_ring_w5, 2, 8, 4]) = llmopt.kv_write(%k_0, %v_0, %transpose_1, %transpose_2, %slot_mapping_ring_w5)
  %cached_attention_0 : f32[1, T, 2, 4] = llmopt.cached_attention(%transpose_0, %kv_write_0.0, %kv_write_0.1, %block_table_ring_w5, %cu_seqlens, %seq_lens, None, 0.5, 5, 0.0, 0, True)
  %sym_size_3 : T = aten.sym_size.int(%cached_attention_0, 1)
  %view_3 : f32[1, T, 8] = aten.view(%cached_attention_0, (1, %sym_size_3, 8))
  %linear_3 : f32[1, T, 17] = aten.linear(%view_3, @head.weight)
  return (%linear_3, %kv_write_0.0, %kv_write_0.1)
}
""",  # noqa: E501
    )
