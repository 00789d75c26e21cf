"""From an exported program to the graph vocabulary of the IR: weights as get_attr, no export artifacts."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from llmopt.errors import UnsupportedModelError

PREFIX = "model_to_capture."  # the wrapper's attribute, see tracing.Step
aten = torch.ops.aten
IDENTITIES = {aten.alias.default, aten.detach_.default, aten.detach.default, aten.lift_fresh_copy.default}
ASSERTIONS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "_check"}
INPUT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def import_graph(program: ExportedProgram) -> fx.Graph:
    """The program's graph with parameters as get_attr nodes named as in the model, cleaned, ``meta["scope"]`` set."""
    graph = fx.Graph()
    targets = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.kind in INPUT_KINDS}
    copy_nodes(graph, program.graph_module, {}, targets)
    for node in list(graph.nodes):
        simplify(graph, node)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    refuse_mutation(graph)
    graph.lint()
    return graph


def copy_nodes(
    graph: fx.Graph, owner: fx.GraphModule, values: dict[fx.Node, Any], targets: dict[str, Any], inner: bool = False
) -> Any:
    """Copy an (inner) graph module's nodes, inlining regions that only switch gradients or autocast; returns its result."""
    for node in owner.graph.nodes:
        if node.op == "placeholder" and inner:
            continue
        if node.op == "output":
            result = fx.map_arg(node.args[0], lambda n: values[n])
            if not inner:
                graph.output(tuple(result))
            return result
        body = region(owner, node)
        if body is not None:
            arguments = [fx.map_arg(a, lambda n: values[n]) for a in node.args[body[1] :]]
            formal = [n for n in body[0].graph.nodes if n.op == "placeholder"]
            values[node] = copy_nodes(graph, body[0], {**values, **dict(zip(formal, arguments))}, targets, True)
        elif node.op == "placeholder" and node.name in targets:
            values[node] = graph.create_node("get_attr", targets[node.name].removeprefix(PREFIX))
            values[node].meta["val"] = node.meta["val"]
        elif node.op == "get_attr" and isinstance(getattr(owner, str(node.target), None), fx.GraphModule):
            continue
        elif node.target is operator.getitem and not isinstance(values[node.args[0]], fx.Node):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
            values[node].meta = {"val": node.meta.get("val"), "scope": scope_of(node)}
    return None


def region(owner: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, int] | None:
    """The body of a gradient or autocast region and the index of its first argument."""
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        return None
    for index, arg in enumerate(node.args):
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            body = getattr(owner, str(arg.target), None)
            if isinstance(body, fx.GraphModule):
                return body, index + 1
    return None


def scope_of(node: fx.Node) -> str:
    """Path of the innermost module a node came from, without the capture wrapper's own prefix."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(list(stack.values()))), "")
    return path.removeprefix(PREFIX[:-1]).removeprefix(".")


def simplify(graph: fx.Graph, node: fx.Node) -> None:
    """Drop a node that changes nothing or only asserts; fold a slice of everything."""
    if node.op != "call_function":
        return
    name = getattr(node.target, "__name__", "").partition(".")[0]
    if name in ASSERTIONS:
        graph.erase_node(node)
    elif node.target in IDENTITIES or is_noop(node, name):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)


def is_noop(node: fx.Node, name: str) -> bool:
    """Whether a cast, copy, dropout, expand or view returns its input unchanged."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    same = before.dtype == after.dtype and len(before.shape) == len(after.shape) and equal_shapes(before, after)
    if name in ("to", "_to_copy", "type_as", "expand", "contiguous", "clone", "view", "reshape", "slice"):
        return same
    return name in ("dropout", "dropout_", "feature_dropout") and (node.args[1] == 0.0 or node.args[2] is False)


def equal_shapes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two shapes are the same expressions, without adding guards."""
    return all(str(x) == str(y) for x, y in zip(a.shape, b.shape))


def refuse_mutation(graph: fx.Graph) -> None:
    """Raise UnsupportedModelError when an op writes to its argument: the IR is pure."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            raise UnsupportedModelError(
                f"{node.target} changes a tensor in place", where=node.meta.get("scope") or node.name
            )
