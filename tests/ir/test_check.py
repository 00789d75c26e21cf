"""--check-passes: honest passes stay silent, wrong ones are named with the node; lossy ones are reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import fx

from llmopt.errors import DriftError
from llmopt.ir.check import PassChecker, golden_tokens
from llmopt.ir.linears import stack
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext, PassManager
from llmopt.ir.rewrite import call, results, sweep
from llmopt.ir.weights import Constant
from llmopt.lower.fork import fork
from tests.ir.handmade import aten, dialect, llama
from tests.passes.running import FUSIONS, build, checked, context, run

SERVING = (*FUSIONS, "rewrite_kv_cache", "fuse_rope_kv_write", "prune_logits")


@dataclass(frozen=True)
class Wrong(Pass):
    """A pass that verifies and yet changes what the model computes."""

    name: ClassVar[str] = "wrong"

    act: Callable[[Module, fx.GraphModule], None] = field(default=lambda module, function: None)

    def run(self, module: Module, ctx: PassContext) -> int:
        """Do it to every function."""
        for function in self.served(module):
            self.act(module, function)
        return 1


def last(function: fx.GraphModule, target: object) -> fx.Node:
    """The last call of an op."""
    return list(function.graph.find_nodes(op="call_function", target=target))[-1]


def narrow_window(module: Module, function: fx.GraphModule) -> None:
    node = last(function, dialect.attention.default)
    node.update_arg(5, node.args[5] - 1)  # type: ignore[operator]


def other_epsilon(module: Module, function: fx.GraphModule) -> None:
    last(function, dialect.rms_norm.default).update_arg(2, 1e-2)


def other_weight(module: Module, function: fx.GraphModule) -> None:
    value = module.weights["lm_head.weight"].tensor().clone()
    value[5] *= 1.001
    module.weights["lm_head.weight"] = Constant(value)


def swapped_rows(module: Module, function: fx.GraphModule) -> None:
    """fuse_gate_up with the rows of up first."""
    mul = last(function, aten.mul.Tensor)
    gate, up = mul.args[0].args[0], mul.args[1]  # type: ignore[union-attr]
    fused = stack(function, module, [up, gate], "gate_up_proj")  # type: ignore[list-item]
    first, second = sorted(next(iter(fused.users)).users)
    users = [(user, first, second) for user in first.users] + [(user, second, first) for user in second.users]
    for user, old, new in users:
        user.replace_input_with(old, new)


def wrong_fused_norm(module: Module, function: fx.GraphModule) -> None:
    """A fused op that replaces two nodes, with a wrong offset."""
    norm = last(function, dialect.rms_norm.default)
    add = norm.args[0]
    with function.graph.inserting_before(add):  # type: ignore[arg-type]
        operands = (*reversed(add.args), norm.args[1], 1e-5, 0.9, False)  # type: ignore[union-attr, arg-type]
        fused = call(function, module, dialect.add_rms_norm.default, *operands, like=norm)
    normed, _ = results(function, fused)
    norm.replace_all_uses_with(normed)
    sweep(function)


@pytest.mark.parametrize(
    ("act", "node"),
    [
        (narrow_window, "node attention_default_1 .layers.1.attn."),
        (other_epsilon, "node rms_norm_default_4"),
        (other_weight, "node linear_default_14"),
        (swapped_rows, "node split_with_sizes_default .layers.1.mlp."),
        (wrong_fused_norm, "node add_rms_norm_default"),
    ],
)
def test_names_pass_node_and_error(act: Callable[[Module, fx.GraphModule], None], node: str) -> None:
    with pytest.raises(DriftError, match=rf"pass wrong, function step, {node}.*: logits drift by .*, tolerance"):
        checked(llama(2, (0, 5)), "eliminate_noops", Wrong(act=act))


def test_honest_passes_pass() -> None:
    checker = checked(llama(2, (0, 5)), *SERVING)
    assert [d.pass_name for d in checker.drifts] == list(SERVING)
    assert all(d.bound is not None and d.error <= d.bound for d in checker.drifts)


def test_steps_are_compared_too() -> None:
    """One prefill equals the captured logits, decoding does not: a position fed as the row's index in the step."""

    def restart(module: Module, function: fx.GraphModule) -> None:
        ids, positions, *_ = function.graph.find_nodes(op="placeholder")
        with function.graph.inserting_before(next(iter(positions.users))):
            flat = call(function, module, aten.ones_like.default, ids)
            sums = call(function, module, aten.cumsum.default, flat, 1)
            rows = call(function, module, aten.sub.Tensor, sums, 1)
        for user in list(positions.users):
            user.replace_input_with(positions, rows)

    with pytest.raises(DriftError, match="pass wrong, function step: prefill and decode steps drift"):
        checked(llama(2), "rewrite_kv_cache", Wrong(act=restart))


def test_lossy_passes_are_reported() -> None:
    checker = checked(llama(2), *FUSIONS, ("quantize_weights", {"bits": 8}), "rewrite_kv_cache")
    quantized = next(d for d in checker.drifts if d.pass_name == "quantize_weights")
    assert quantized.bound is None
    assert 1e-4 < quantized.error < 0.2
    after = checker.drifts[-1]
    assert after.bound is not None, "the next pass is compared with the quantized model"
    assert after.error <= after.bound


def test_both_functions_of_a_fork() -> None:
    module = llama(1)
    checker = PassChecker()
    manager = PassManager(check=checker)
    manager.run(module, [build("fuse_qkv"), build("rewrite_kv_cache")], context())
    fork(module, ("decode", "extend"))
    manager.run(module, [build("fuse_rope_kv_write"), build("prune_logits")], context())
    assert [(d.pass_name, d.function) for d in checker.drifts[2:]] == [
        (p, f) for p in ("fuse_rope_kv_write", "prune_logits") for f in ("decode", "extend")
    ]


def test_golden_tokens_leave_the_window() -> None:
    module = llama(1, (40,))
    assert len(golden_tokens(module)) == 48
    assert golden_tokens(module) == golden_tokens(module)
    assert len(golden_tokens(llama(1))) == 24


def test_bfloat16() -> None:
    module = llama(2, (0, 5), dtype=torch.bfloat16)
    checker = checked(module, *SERVING)
    assert all(d.bound is not None and d.bound > 1e-3 for d in checker.drifts)
    with pytest.raises(DriftError):
        checked(llama(2, (0, 5), dtype=torch.bfloat16), Wrong(act=narrow_window))


def test_nothing_runs_without_a_checker() -> None:
    run(llama(1), Wrong(act=other_weight))
