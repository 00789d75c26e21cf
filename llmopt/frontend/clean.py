"""From an exported program to the graph vocabulary of the IR: weights as get_attr, no export artifacts."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from llmopt.errors import UnsupportedModelError
from llmopt.frontend.fills import fold_fills

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
    fold_fills(graph)
    purify(graph)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return graph


def copy_nodes(
    graph: fx.Graph, owner: fx.GraphModule, values: dict[fx.Node, Any], targets: dict[str, Any], inner: bool = False
) -> Any:
    """Copy a graph module's nodes, inlining regions that only switch gradients or autocast; returns its result."""
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
    path = next((str(path) for path, _ in reversed(list(stack.values())) if not str(path).startswith("_")), "")
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
    same = before.dtype == after.dtype and equal_shapes(before, after)
    if name in ("to", "_to_copy", "type_as", "expand", "contiguous", "clone", "view", "reshape", "slice"):
        return same
    return name in ("dropout", "dropout_") and bool(node.args[1] == 0.0 or node.args[2] is False)


def equal_shapes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two shapes are the same expressions, without adding guards."""
    return tuple(map(str, a.shape)) == tuple(map(str, b.shape))


def purify(graph: fx.Graph) -> None:
    """Replace in-place ops by their pure forms; raises UnsupportedModelError when views make that unsafe."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        pure, changed = pure_form(node), node.args[0]
        if pure is None or aliased(changed, node, order):
            raise UnsupportedModelError(
                f"{node.target} changes a tensor in place", where=node.meta.get("scope") or node.name
            )
        with graph.inserting_before(node):
            new = graph.call_function(pure, node.args, node.kwargs)
        new.meta, order[new] = dict(node.meta), order[node]
        for later in [u for u in changed.users if order[u] > order[node]]:
            later.replace_input_with(changed, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def pure_form(node: fx.Node) -> Any:
    """The functional overload of an in-place op (``div_`` is ``div``), if it has one."""
    target: Any = node.target
    name = target._opname
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None) if name.endswith("_") and packet else None
    return overload if overload is not None and not overload._schema.is_mutable else None


def aliased(tensor: Any, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a tensor written by ``write`` shares memory with another value, an input or a weight."""
    if not isinstance(tensor, fx.Node) or tensor.op != "call_function" or returns_view(tensor):
        return True
    return any(
        returns_view(u) and any(order[v] > order[write] for v in u.users) for u in tensor.users if u is not write
    )


def returns_view(node: fx.Node) -> bool:
    """Whether a node's result may alias its arguments."""
    if node.target is operator.getitem:
        return returns_view(node.args[0])  # type: ignore[arg-type]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    return not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)
