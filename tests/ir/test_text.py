"""The text form: the same for equal modules in any process, whatever fx called the nodes."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from pathlib import Path

from expecttest import assert_expected_inline

from llmopt.ir.text import print_function, print_module
from tests.ir.handmade import Builder, aten, llama
from tests.passes.running import FUSIONS, run

SCRIPT = """
from tests.ir.handmade import llama
from tests.passes.running import FUSIONS, run
from llmopt.ir.text import print_module
module = llama(2, (0, 5))
run(module, *FUSIONS, ("rewrite_kv_cache", {"layout": "ring", "max_chunk": 4}), "fuse_rope_kv_write", "prune_logits")
print(print_module(module), end="")
"""


def test_golden_text() -> None:
    b = Builder()
    b.scope = "layers.0"
    x = b.rms_norm(b.embed(8), "norm")
    first, second = b.split(aten.chunk.default, b.linear(x, "up", 8, bias=True), 2, -1)
    b.scope = "head"
    cos, _ = b.rotary(8)
    module = b.finish(b.call(aten.cat.default, [first, b.call(aten.mul.Tensor, second, cos)], -1))
    assert_expected_inline(
        print_function(module, "step"),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
) {
  # layers.0
  %embedding_0 : f32[1, T, 8] = aten.embedding(@embed.weight, %input_ids)
  %rms_norm_0 : f32[1, T, 8] = llmopt.rms_norm(%embedding_0, @norm.weight, 1e-05, 1.0, False)
  %linear_0 : f32[1, T, 8] = aten.linear(%rms_norm_0, @up.weight, @up.bias)
  %chunk_0 : (f32[1, T, 4], f32[1, T, 4]) = aten.chunk(%linear_0, 2, -1)
  # head
  %rotary_table_0 : (f32[1, T, 4], f32[1, T, 4]) = llmopt.rotary_table(%position_ids, @rotary.inv_freq, 1.0, None, 1.0, 0, None, f32)
  %mul_0 : f32[1, T, 4] = aten.mul.Tensor(%chunk_0.1, %rotary_table_0.0)
  %cat_0 : f32[1, T, 8] = aten.cat((%chunk_0.0, %mul_0), -1)
  return (%cat_0)
}
""",  # noqa: E501
    )


def test_independent_of_fx_names() -> None:
    first, second = llama(1), llama(1)
    for i, node in enumerate(second.functions["step"].graph.nodes):
        if node.op == "call_function":
            node.name = f"renamed_{i}"
    assert print_module(first) == print_module(second)


def test_same_in_every_process(root: Path) -> None:
    texts = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    module = llama(2, (0, 5))
    layout = {"layout": "ring", "max_chunk": 4}
    run(module, *FUSIONS, ("rewrite_kv_cache", layout), "fuse_rope_kv_write", "prune_logits")
    assert texts == {print_module(module)}


def test_prints_sizes_and_scopes() -> None:
    b = Builder()
    x = b.embed(8)
    size = b.call(aten.sym_size.int, x, 1)
    shape = [1, b.call(operator.mul, size, 2), 4]
    text = print_function(b.finish(b.call(aten.view.default, x, shape)), "step")
    assert "%mul_0 : 2*T = operator.mul(%sym_size_0, 2)" in text
    assert "%view_0 : f32[1, 2*T, 4] = aten.view(%embedding_0, (1, %mul_0, 4))" in text
