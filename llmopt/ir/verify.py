"""The verifier: what holds of every module between passes; and the refresh of ``meta["val"]``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import llmopt.ir.ops  # noqa: F401  (registers the dialect)
from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.propagation import Propagation
from llmopt.ir.rewrite import same_shape
from llmopt.program import StateSpec

STATE_WRITES: dict[Any, tuple[str, ...]] = {
    torch.ops.llmopt.kv_write.default: ("k_state", "v_state"),
    torch.ops.llmopt.rope_kv_write.default: ("k_state", "v_state"),
}
"""Ops that consume a state and return its next version, by argument name."""

SCALES = {"k_state": "k_scale", "v_state": "v_scale"}
"""The argument that gives the scales of a state's codes, beside the state's, in every op that takes states."""

BAD_TAGS = (
    torch.Tag.nondeterministic_seeded,  # dropout, rand: a compiled step must be a function of its inputs
    torch.Tag.data_dependent_output,  # item(): no value known when the program is planned
    torch.Tag.dynamic_output_shape,  # nonzero: a dim that no input's shape gives
)


def refresh(module: Module) -> None:
    """Recompute every node's ``meta["val"]`` from the placeholders'. Raises PassError naming the node that fails.

    What a call gives for the same types of arguments is computed once for all refreshes of the module.
    """
    for name, function in module.functions.items():
        _check_structure(name, function.graph)
        inputs = [n.meta["val"] for n in function.graph.nodes if n.op == "placeholder"]
        propagation = Propagation(function, module.fake_mode, module.propagated)
        try:
            with module.faking():
                propagation.propagate_dont_convert_inputs(*inputs)
        except Exception as error:
            what = f"shapes do not propagate: {str(error).splitlines()[0] if str(error) else error!r}"
            raise PassError(what, where=_where(name, propagation.current)) from error


def verify(module: Module, before: dict[str, Any] | None = None) -> None:
    """Raise PassError, naming function and node, unless the module is well formed.

    Known pure ops only; arguments defined before use; ``meta["val"]`` present; weights in the table with the
    node's shape and dtype, one node a weight; states used linearly (written once, read only through their latest
    version), those of codes always with their scales; outputs tensors; symbolic dims still symbolic; no dangling
    nodes. ``before`` is a signature taken before a pass: logits keep dtype and vocabulary, original inputs their
    names and types.
    """
    for name, function in module.functions.items():
        _check_structure(name, function.graph)
        _check_nodes(module, name, function.graph)
        _check_states(module, name, function.graph)
    after = signature(module)
    for key, value in (before or {}).items():
        if key[0] in module.functions and after.get(key) != value:
            raise PassError(f"{key[1]} changed from {value} to {after.get(key)}", where=f"function {key[0]}")


def signature(module: Module) -> dict[Any, str]:
    """What no pass may change: each input's type, the logits' dtype and vocabulary."""
    found = {}
    for name, function in module.functions.items():
        for node in function.graph.nodes:
            if node.op == "placeholder":
                value = node.meta["val"]
                found[name, f"input {node.name}"] = f"{value.dtype} {tuple(map(str, value.shape))}"
            elif node.op == "output":
                logits = node.args[0][0].meta["val"]
                found[name, "logits"] = f"{logits.dtype} (1, rows, {logits.shape[-1]})"
    return found


def is_known(node: fx.Node) -> bool:
    """Whether a call belongs to the IR: the dialect, pure aten, getitem and arithmetic on sizes."""
    target: Any = node.target
    if target is torch.ops.aten.dropout.default:
        _, probability, training = node.args
        return bool(probability == 0 or training is False)  # draws nothing, whatever its tag says
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace == "llmopt":
            return True
        schema: Any = target._schema
        return target.namespace == "aten" and not schema.is_mutable and not any(t in target.tags for t in BAD_TAGS)
    return getattr(target, "__module__", None) in ("_operator", "math")


def _check_structure(name: str, graph: fx.Graph) -> None:
    """Arguments defined before their use, names unique, node kinds of the IR."""
    defined: set[fx.Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        where = _where(name, node)
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise PassError(f"node kind {node.op} does not belong to the IR", where=where)
        late = [source.name for source in node.all_input_nodes if source not in defined]
        if late:
            raise PassError(f"it reads {late[0]}, which comes after it or is erased", where=where)
        if node.name in names:
            raise PassError("the name is used twice", where=where)
        defined.add(node)
        names.add(node.name)


def _check_nodes(module: Module, name: str, graph: fx.Graph) -> None:
    weights: set[str] = set()
    for node in graph.nodes:
        where = _where(name, node)
        if node.op == "output":
            _check_output(node, where)
            continue
        if "val" not in node.meta:
            raise PassError('meta["val"] is missing', where=where)
        if node.op == "call_function" and not is_known(node):
            raise PassError(f"op {node.target} is not known to the IR or not pure", where=where)
        if node.op == "get_attr":
            _check_weight(module, node, where)
            if str(node.target) in weights:
                raise PassError(f"weight {node.target} has two nodes", where=where)
            weights.add(str(node.target))
        if not node.users and node.op != "placeholder":
            raise PassError("nothing uses the node's result", where=where, hint="the pass must erase what it replaces")
        if node.op == "placeholder":
            _check_symbolic(module, node, where)


def _check_output(node: fx.Node, where: str) -> None:
    for item in node.args[0]:  # type: ignore[union-attr]
        if not isinstance(item, fx.Node) or not isinstance(item.meta.get("val"), torch.Tensor):
            raise PassError(f"output {item} is not a tensor", where=where)


def _check_weight(module: Module, node: fx.Node, where: str) -> None:
    entry, value = module.weights.get(str(node.target)), node.meta["val"]
    if entry is None:
        raise PassError(f"weight {node.target} is not in the weight table", where=where)
    if tuple(entry.shape) != tuple(value.shape) or entry.dtype != value.dtype:
        expected, found = f"{entry.dtype} {tuple(entry.shape)}", f"{value.dtype} {tuple(value.shape)}"
        raise PassError(f"weight {node.target} is {expected} in the table, {found} in the graph", where=where)


def _check_symbolic(module: Module, node: fx.Node, where: str) -> None:
    for dim in node.meta["val"].shape:
        if isinstance(dim, torch.SymInt):
            unknown = {s.name for s in dim.node.expr.free_symbols} - set(module.symbols)
            if dim.node.expr.is_number or unknown:
                what = f"became the constant {dim.node.expr}" if not unknown else f"has no name: {sorted(unknown)}"
                raise PassError(f"a symbolic dim {what}", where=where)


def _check_states(module: Module, name: str, graph: fx.Graph) -> None:
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    outputs = next(n for n in graph.nodes if n.op == "output").args[0]
    order = {node: i for i, node in enumerate(graph.nodes)}
    for spec in (s for group in module.states for s in group.states):
        if spec.input not in placeholders or spec.input not in module.state_outputs:
            raise PassError(f"state {spec.input} is not an input with an output", where=f"function {name}")
        version = placeholders[spec.input]
        _check_scales(module, spec, version, name)
        while (written := _next_version(version, order, name)) is not None:
            version = written
            _check_scales(module, spec, version, name)
        old, new = placeholders[spec.input].meta["val"], version.meta["val"]
        if not same_shape(old, new) or old.dtype != new.dtype:
            raise PassError(f"state {spec.input} changes its type", where=_where(name, version))
        if outputs[module.state_outputs[spec.input]] is not version:
            raise PassError(f"the final version of state {spec.input} is not its output", where=_where(name, version))


def _check_scales(module: Module, spec: StateSpec, version: fx.Node, name: str) -> None:
    """Whatever takes a version of a state takes the state's scales with it, one a head, and no others."""
    if spec.scales is not None:
        found = module.weights.get(spec.scales)
        if found is None or found.shape != (spec.heads,) or found.dtype != torch.float32:
            what = f"state {spec.input} of {spec.heads} heads needs as many float32 scales, named {spec.scales}"
            raise PassError(what, where=f"function {name}")
    for user in version.users:
        schema: Any = getattr(user.target, "_schema", None)
        given = dict(zip((a.name for a in schema.arguments), user.args)) | dict(user.kwargs) if schema else {}
        for state, scale in SCALES.items():
            taken = given.get(scale)
            if given.get(state) is version and (taken and str(taken.target)) != spec.scales:
                what = f"it takes state {spec.input} with scales {taken}, not {spec.scales}"
                raise PassError(what, where=_where(name, user))


def _next_version(version: fx.Node, order: dict[fx.Node, int], name: str) -> fx.Node | None:
    """The state written over ``version``; raises when two writes take it or it is read after the write."""
    writes = [u for u in version.users if _written_index(u, version) is not None]
    if not writes:
        return None
    if len(writes) > 1:
        raise PassError(f"state version {version.name} is written twice", where=_where(name, writes[1]))
    write = writes[0]
    stale = [u for u in version.users if u is not write]
    if stale:
        raise PassError(f"{stale[0].name} reads state version {version.name} that {write.name} overwrites",
                        where=_where(name, stale[0]))  # fmt: skip
    index = _written_index(write, version)
    found = [u for u in write.users if u.target is operator.getitem and u.args[1] == index]
    if len(found) != 1 or order[found[0]] < order[write]:
        raise PassError(f"the state {write.name} writes over {version.name} is lost", where=_where(name, write))
    return found[0]


def _written_index(node: fx.Node, version: fx.Node) -> int | None:
    """Output index of the next version when ``node`` writes over ``version``."""
    names = STATE_WRITES.get(node.target)
    if names is None:
        return None
    schema: Any = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)
    first = len(schema.returns) - len(names)
    return next((first + i for i, name in enumerate(names) if given.get(name) is version), None)


def _where(function: str, node: fx.Node | None) -> str:
    if node is None:
        return f"function {function}"
    scope = node.meta.get("scope")
    return f"function {function}, node {node.name}" + (f" ({scope})" if scope else "")
