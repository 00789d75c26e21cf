"""The pass manager: order, expect, dumps, records; and that a broken pass is caught by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from torch import fx

from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext, PassManager, check_order, split_at_fork
from llmopt.ir.rewrite import sweep
from llmopt.ir.text import print_function
from llmopt.lower.fork import fork
from llmopt.recipe import build_pass
from tests.ir.handmade import aten, llama
from tests.passes.running import FUSIONS, context, ops, run


@dataclass(frozen=True)
class Custom(Pass):
    """A pass that does what the test says to each function."""

    name: ClassVar[str] = "custom"

    act: Callable[[Module, fx.GraphModule], int] = field(default=lambda module, function: 0)

    def run(self, module: Module, ctx: PassContext) -> int:
        """Act on the functions served."""
        return sum(self.act(module, function) for function in self.served(module))


def test_records() -> None:
    records = run(llama(2), *FUSIONS)
    assert [(r.name, r.rewrites) for r in records] == list(zip(FUSIONS, (0, 2, 2, 2, 4)))
    assert all(after.nodes_before == before.nodes_after for before, after in itertools.pairwise(records))
    assert all(r.ms > 0 for r in records)


def test_expect() -> None:
    run(llama(2), ("fuse_qkv", {"expect": 2}))
    with pytest.raises(PassError, match="pass fuse_qkv: made 2 rewrites, the recipe expects 3"):
        run(llama(2), ("fuse_qkv", {"expect": 3}))


def test_dumps_the_text_after_each_pass(tmp_path: Path) -> None:
    module = llama(1)
    before = print_function(module, "step")
    manager = PassManager(dump_dir=tmp_path / "ir")
    manager.run(module, [build_pass("fuse_qkv"), build_pass("fuse_gate_up")], context())
    fork(module, ("decode", "extend"))
    manager.run(module, [build_pass("fuse_gated_activation", {"functions": ["decode"]})], context())
    found = sorted(p.name for p in (tmp_path / "ir").iterdir())
    assert found == [
        "00-captured.step.txt",
        "01-fuse_qkv.step.txt",
        "02-fuse_gate_up.step.txt",
        "03-fuse_gated_activation.decode.txt",
        "03-fuse_gated_activation.extend.txt",
    ]
    assert (tmp_path / "ir" / found[0]).read_text() == before
    assert (tmp_path / "ir" / found[3]).read_text() == print_function(module, "decode")


def test_functions_restrict_a_pass() -> None:
    module = llama(1)
    fork(module, ("decode", "extend"))
    run(module, ("fuse_add_norm", {"functions": ["extend"]}))
    counts = {
        name: len(function.graph.find_nodes(op="call_function", target=aten.add.Tensor))
        for name, function in module.functions.items()
    }
    assert counts == {"decode": 2, "extend": 0}
    with pytest.raises(PassError, match=r"pass fuse_qkv: there is no function 'prefill' \(known: decode, extend\)"):
        run(module, ("fuse_qkv", {"functions": ["prefill"]}))


def test_split_at_fork() -> None:
    passes = [
        build_pass("fuse_qkv"),
        build_pass("fuse_add_norm", {"functions": ["decode"]}),
        build_pass("prune_logits"),
    ]
    common, forked = split_at_fork(passes)
    assert [p.name for p in common] == ["fuse_qkv"]
    assert [p.name for p in forked] == ["fuse_add_norm", "prune_logits"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("rewrite_kv_cache", "fuse_qkv"),
        ("quantize_weights", "fuse_qkv"),
        ("quantize_weights", "fuse_gate_up"),
        ("fuse_gated_activation", "fuse_gate_up"),
        ("fuse_rope_kv_write", "rewrite_kv_cache"),
    ],
)
def test_order_names_the_pass_that_must_come_before(first: str, second: str) -> None:
    module = llama(1)
    before = ops(module)
    with pytest.raises(PassError, match=f"{second} must come before {first}"):
        run(module, first, second)
    assert ops(module) == before, "the order is checked before any pass runs"
    check_order([build_pass(second), build_pass(first)])


def leave_dangling(module: Module, function: fx.GraphModule) -> int:
    node = function.graph.find_nodes(op="call_function", target=aten.silu.default)[0]
    node.replace_all_uses_with(node.args[0])
    return 1


def narrow_head(module: Module, function: fx.GraphModule) -> int:
    first, *_, last = function.graph.find_nodes(op="call_function", target=aten.linear.default)
    last.update_arg(1, first.args[1])
    sweep(function)
    return 1


def forget_weight(module: Module, function: fx.GraphModule) -> int:
    del module.weights["lm_head.weight"]
    return 1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (leave_dangling, "pass custom, function step, node silu_default .layers.0.mlp.: nothing uses"),
        (narrow_head, "pass custom, function step: logits changed"),
        (forget_weight, "pass custom, function step, node lm_head_weight: weight lm_head.weight is not in"),
    ],
)
def test_a_broken_pass_is_caught_by_name(act: Callable[[Module, fx.GraphModule], int], message: str) -> None:
    with pytest.raises(PassError, match=message):
        run(llama(1), Custom(act=act))
