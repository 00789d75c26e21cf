"""The verifier: each rule has a graph that breaks it, and its error names the node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.rewrite import new_dim
from llmopt.ir.verify import refresh, signature, verify
from llmopt.ir.weights import Constant
from tests.ir.handmade import aten, dialect, llama
from tests.passes.running import run


def nodes(module: Module, target: Any) -> list[fx.Node]:
    """Calls of an op."""
    return list(module.functions["step"].graph.find_nodes(op="call_function", target=target))


def cached() -> Module:
    """A Llama with KV states."""
    module = llama(1)
    run(module, "rewrite_kv_cache")
    return module


def unknown_op(module: Module) -> None:
    nodes(module, aten.silu.default)[0].target = torch.nn.functional.silu


def mutating_op(module: Module) -> None:
    nodes(module, aten.silu.default)[0].target = aten.silu_.default


def random_op(module: Module) -> None:
    nodes(module, aten.silu.default)[0].target = aten.bernoulli.default


def data_dependent_op(module: Module) -> None:
    nodes(module, aten.silu.default)[0].target = aten.nonzero.default


def active_dropout(module: Module) -> None:
    node = nodes(module, aten.silu.default)[0]
    node.target, node.args = aten.dropout.default, (node.args[0], 0.5, True)


def no_value(module: Module) -> None:
    del nodes(module, aten.silu.default)[0].meta["val"]


def dangling(module: Module) -> None:
    node = nodes(module, aten.silu.default)[0]
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def out_of_order(module: Module) -> None:
    silu = nodes(module, aten.silu.default)[0]
    nodes(module, aten.mul.Tensor)[0].append(silu)


def missing_weight(module: Module) -> None:
    del module.weights["lm_head.weight"]


def wrong_weight(module: Module) -> None:
    module.weights["lm_head.weight"] = Constant(torch.zeros(17, 15))


def wrong_dtype(module: Module) -> None:
    module.weights["lm_head.weight"] = Constant(torch.zeros(17, 16, dtype=torch.float16))


def two_nodes(module: Module) -> None:
    graph = module.functions["step"].graph
    node = next(n for n in graph.nodes if n.op == "get_attr" and n.target == "lm_head.weight")
    with graph.inserting_before(node):
        twin = graph.create_node("get_attr", "lm_head.weight")
    twin.meta.update(node.meta)
    head = nodes(module, aten.linear.default)[-1]
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        again = graph.call_function(head.target, (head.args[0], twin))  # type: ignore[arg-type]
    again.meta.update(head.meta)
    output.args = ((head, again),)


def bad_output(module: Module) -> None:
    output = next(n for n in module.functions["step"].graph.nodes if n.op == "output")
    output.args = ((*output.args[0], 1.0),)  # type: ignore[misc]


def written_twice(module: Module) -> None:
    write = nodes(module, dialect.kv_write.default)[0]
    with module.functions["step"].graph.inserting_after(write):
        again = module.functions["step"].graph.call_function(write.target, write.args)  # type: ignore[arg-type]
    again.meta.update(write.meta)
    output = next(n for n in module.functions["step"].graph.nodes if n.op == "output")
    with module.functions["step"].graph.inserting_before(output):
        taken = module.functions["step"].graph.call_function(_getitem(module), (again, 0))
    taken.meta["val"] = write.meta["val"][0]
    output.args = ((*output.args[0], taken),)  # type: ignore[misc]


def _getitem(module: Module) -> Any:
    return next(n.target for n in module.functions["step"].graph.nodes if "getitem" in n.name)


def stale_read(module: Module) -> None:
    inputs = {n.name: n for n in module.functions["step"].graph.nodes if n.op == "placeholder"}
    nodes(module, dialect.cached_attention.default)[0].update_arg(1, inputs["k_0"])


def lost_state(module: Module) -> None:
    output = next(n for n in module.functions["step"].graph.nodes if n.op == "output")
    inputs = {n.name: n for n in module.functions["step"].graph.nodes if n.op == "placeholder"}
    output.args = ((output.args[0][0], inputs["k_0"], output.args[0][2]),)  # type: ignore[index]


def swapped_states(module: Module) -> None:
    output = next(n for n in module.functions["step"].graph.nodes if n.op == "output")
    logits, k, v = output.args[0]  # type: ignore[misc]
    output.args = ((logits, v, k),)


def unnamed_dim(module: Module) -> None:
    dim = new_dim(module, "Z", 1, 9)
    del module.symbols[dim.node.expr.name]
    module.functions["step"].graph.find_nodes(op="placeholder")[0].meta["val"] = module.fake((1, dim), torch.int64)


BROKEN: list[tuple[Callable[[], Module], Callable[[Module], None], str]] = [
    (llama, unknown_op, "node silu_default.*not known"),
    (llama, mutating_op, "silu_default.*not pure"),
    (llama, random_op, "silu_default.*not pure"),
    (llama, data_dependent_op, "silu_default.*not pure"),
    (llama, active_dropout, "silu_default.*not pure"),
    (llama, no_value, "node silu_default.*val.*missing"),
    (llama, dangling, "node silu_default.*nothing uses"),
    (llama, out_of_order, "node mul_tensor.*reads silu_default"),
    (llama, missing_weight, "lm_head.weight is not in the weight table"),
    (llama, wrong_weight, r"lm_head.weight is torch.float32 \(17, 15\) in the table"),
    (llama, wrong_dtype, "lm_head.weight is torch.float16"),
    (llama, two_nodes, "lm_head.weight has two nodes"),
    (llama, bad_output, "output 1.0 is not a tensor"),
    (cached, written_twice, "state version k_0 is written twice"),
    (cached, stale_read, "cached_attention_default reads state version k_0"),
    (cached, lost_state, "node output: output reads state version k_0 that kv_write_default overwrites"),
    (cached, swapped_states, "final version of state k_0 is not its output"),
    (llama, unnamed_dim, "node input_ids.*has no name"),
]


@pytest.mark.parametrize(("make", "damage", "message"), BROKEN, ids=lambda x: getattr(x, "__name__", None))
def test_names_what_is_broken(make: Callable[[], Module], damage: Callable[[Module], None], message: str) -> None:
    module = make()
    verify(module)
    damage(module)
    with pytest.raises(PassError, match=message):
        verify(module)


def test_refresh_keeps_symbolic_dims() -> None:
    module = llama(1)
    refresh(module)
    output = next(n for n in module.functions["step"].graph.nodes if n.op == "output").args[0][0]  # type: ignore[index]
    rows = output.meta["val"].shape[1]
    assert isinstance(rows, torch.SymInt)
    assert module.symbols[rows.node.expr.name] == "T"


def test_refresh_names_the_node_whose_shapes_clash() -> None:
    module = llama(1)
    linears = nodes(module, aten.linear.default)
    linears[-1].update_arg(1, linears[-2].args[1])
    with pytest.raises(PassError, match=f"node {linears[-1].name}.*shapes do not propagate"):
        refresh(module)


def test_a_pass_may_not_change_the_logits_type() -> None:
    module = llama(1)
    before = signature(module)
    graph = module.functions["step"].graph
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        half = graph.call_function(aten.to.dtype, (output.args[0][0], torch.float16))  # type: ignore[index]
    output.args = ((half,),)
    refresh(module)
    verify(module)
    with pytest.raises(PassError, match=r"logits changed from torch\.float32"):
        verify(module, before)
