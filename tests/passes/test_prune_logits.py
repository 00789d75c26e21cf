"""prune_logits: wanted rows only, selected where the row-wise tail begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.errors import PassError
from llmopt.ir.interpret import run_module
from llmopt.ir.module import Module
from llmopt.ir.rewrite import dialect
from tests.ir.handmade import Builder, aten, llama
from tests.passes.running import FUSIONS, TOKENS, logits, ops, rewrites, run, text


def inputs(rows: list[int] | None = None) -> dict[str, torch.Tensor]:
    """The test sequence, with the wanted rows."""
    found = {"input_ids": torch.tensor([TOKENS]), "position_ids": torch.arange(len(TOKENS))[None]}
    return found if rows is None else {**found, "logit_rows": torch.tensor(rows, dtype=torch.int64)}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [[22], [0, 22, 7, 7], list(range(23)), []], ids=len)
def test_fires_and_numerics_unchanged(fused: bool, rows: list[int]) -> None:
    module = llama(2)
    before = run_module(module, "step", inputs())[0]
    assert rewrites(module, *(FUSIONS if fused else ()), "prune_logits") == 1
    torch.testing.assert_close(run_module(module, "step", inputs(rows))[0], before[:, rows])


def test_the_last_mlp_runs_on_the_wanted_rows() -> None:
    module = llama(2)
    run(module, *FUSIONS, "rewrite_kv_cache", "prune_logits")
    calls = ops(module)
    first = calls.index("aten.index_select")
    assert "llmopt.cached_attention" not in calls[first:]
    assert calls[first:].count("llmopt.gated_activation") == 1
    assert calls[:first].count("llmopt.gated_activation") == 1


def softcapped(b: Builder, x: Any) -> Any:
    x = b.call(aten.tanh.default, b.call(aten.div.Tensor, b.linear(x, "head", 17), 3.0))
    return b.call(aten.mul.Tensor, x, 3.0)


def rounded(b: Builder, x: Any) -> Any:
    """Each row is rounded with a scale of its own."""
    return b.linear(b.call(dialect.round_activations.default, x, None, "int8"), "head", 17)


def mixed_rows(b: Builder, x: Any) -> Any:
    """Row t of the logits depends on other rows."""
    return b.call(aten.cumsum.default, b.linear(x, "head", 17), 1)


def axis_norm(b: Builder, x: Any) -> Any:
    """A split along the rows is no row-wise op."""
    halves = b.call(aten.transpose.int, b.call(aten.transpose.int, b.linear(x, "head", 17), 1, 2), 1, 2)
    return b.call(aten.mul.Tensor, halves, b.call(aten.sum.dim_IntList, halves, [1], True))


@pytest.mark.parametrize(
    ("tail", "selected"), [(softcapped, "head"), (rounded, "rounding"), (mixed_rows, "logits"), (axis_norm, "inner")]
)
def test_only_row_wise_tails_move(tail: Any, selected: str) -> None:
    b = Builder()
    module = b.finish(tail(b, b.embed(8)))
    before = run_module(module, "step", inputs())[0]
    run(module, "prune_logits")
    position = ops(module).index("aten.index_select") - len(ops(module))
    assert position == {"head": -5, "rounding": -3, "logits": -1, "inner": -2}[selected]
    torch.testing.assert_close(run_module(module, "step", inputs([3, 20]))[0], before[:, [3, 20]])


def test_must_not_fire_twice() -> None:
    module = llama(1)
    run(module, "prune_logits")
    with pytest.raises(PassError, match="already pruned"):
        run(module, "prune_logits")


def small() -> Module:
    b = Builder()
    x = b.embed(8)
    q, k, v = (b.heads(b.linear(x, f"{n}_proj", 8), 2) for n in "qkv")
    x = b.call(aten.add.Tensor, x, b.attention(q, k, v))
    return b.finish(b.linear(b.rms_norm(x, "norm"), "head", 17))


def test_before_or_after_the_cache() -> None:
    first, second = small(), small()
    run(first, "prune_logits", "rewrite_kv_cache")
    run(second, "rewrite_kv_cache", "prune_logits")
    torch.testing.assert_close(logits(first, [9, 1, 13]), logits(second))


def test_golden_text() -> None:
    module = small()
    run(module, "prune_logits")
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
  %logit_rows : i64[M],
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
  %attention_0 : f32[1, T, 2, 4] = llmopt.attention(%transpose_0, %transpose_1, %transpose_2, None, 0.5, 0, 0.0)
  %sym_size_3 : T = aten.sym_size.int(%attention_0, 1)
  %view_3 : f32[1, T, 8] = aten.view(%attention_0, (1, %sym_size_3, 8))
  %index_select_0 : f32[1, M, 8] = aten.index_select(%embedding_0, 1, %logit_rows)
  %index_select_1 : f32[1, M, 8] = aten.index_select(%view_3, 1, %logit_rows)
  %add_0 : f32[1, M, 8] = aten.add.Tensor(%index_select_0, %index_select_1)
  %rms_norm_0 : f32[1, M, 8] = llmopt.rms_norm(%add_0, @norm.weight, 1e-05, 1.0, False)
  %linear_3 : f32[1, M, 17] = aten.linear(%rms_norm_0, @head.weight)
  return (%linear_3)
}
""",
    )
