"""``--check-passes``: replays a golden sequence before and after each pass and names what drifted."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.errors import DriftError
from llmopt.ir.feed import limit_chunk, run_sequence
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass
from llmopt.ir.tolerance import code_step, row_error, tolerance

LENGTH = 24
"""Tokens of the default golden sequence, at least; windows up to LONGEST make it longer, so that they matter."""

LONGEST = 128


@dataclass(frozen=True)
class Drift:
    """What a pass did to the logits of a function: largest relative error of a row, and the bound (None: lossy)."""

    pass_name: str
    function: str
    error: float
    bound: float | None


@dataclass
class Trace:
    """One replay: the logits, and the value of every call by node name."""

    logits: Tensor
    values: dict[str, Any] = field(default_factory=dict)


class PassChecker:
    """Compares each pass's module with the one before it, through the IR's reference semantics.

    Once the module has KV states the sequence is also fed as prefill chunks and single decode rows. A pass that
    ``changes_numerics`` by design is recorded in ``drifts`` and becomes the next pass's baseline; any other one
    raises DriftError past ``tolerance``, naming pass, node and error.
    """

    def __init__(self, tokens: Sequence[int] | None = None) -> None:
        self.tokens = list(tokens) if tokens is not None else []
        self.traces: dict[str, Trace] = {}
        self.drifts: list[Drift] = []

    def start(self, module: Module) -> None:
        """Record every function the checker has not seen yet."""
        self.tokens = self.tokens or golden_tokens(module)
        self.traces = {name: self._trace(module, name) for name in module.functions}

    def after(self, pass_: Pass, module: Module) -> None:
        """Compare with the record; raises DriftError."""
        for name, before in self.traces.items():
            after = self._trace(module, name)
            bound = None if pass_.changes_numerics else bound_of(module, name)
            error = row_error(after.logits, before.logits)
            self.drifts.append(Drift(pass_.name, name, error, bound))
            graph = module.functions[name].graph
            if bound is not None and error > bound:
                node = first_divergence(graph, before.values, after.values, bound)
                raise drift_error(pass_, name, node, f"logits drift by {error:.2e}, tolerance {bound:.2e}")
            steps = self._chunked(module, name)
            split = row_error(steps, after.logits) if steps is not None else 0.0
            if split > (chunk_bound := bound_of(module, name)):
                what = f"prefill and decode steps drift from one prefill by {split:.2e}, tolerance {chunk_bound:.2e}"
                raise drift_error(pass_, name, None, what)
            self.traces[name] = after

    def _trace(self, module: Module, name: str) -> Trace:
        values: dict[str, Any] = {}

        def observe(node: fx.Node, value: Any) -> None:
            if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
                values[node.name] = value

        chunk = limit_chunk(module, len(self.tokens))
        chunks = [min(chunk, len(self.tokens) - i) for i in range(0, len(self.tokens), chunk)]
        return Trace(run_sequence(module, name, self.tokens, chunks, observe), values)

    def _chunked(self, module: Module, name: str) -> Tensor | None:
        """Logits by a prefill of most tokens, a short chunk, then single rows."""
        if not module.states or len(self.tokens) < 6:
            return None
        prefill = limit_chunk(module, max(1, len(self.tokens) * 2 // 3))
        chunks = [prefill, limit_chunk(module, 3)]
        chunks += [1] * (len(self.tokens) - sum(chunks))
        return run_sequence(module, name, self.tokens, chunks)


def golden_tokens(module: Module) -> list[int]:
    """Seeded random ids, long enough to leave the attention windows where those are short."""
    windows = {
        node.args[5]
        for function in module.functions.values()
        for node in function.graph.find_nodes(op="call_function", target=torch.ops.llmopt.attention.default)
    }
    length = max([LENGTH, *(w + 8 for w in windows if isinstance(w, int) and w + 8 <= LONGEST)])
    generator = torch.Generator().manual_seed(0)
    size = (min(length, module.config.max_context),)
    return torch.randint(module.config.vocab_size, size, generator=generator).tolist()


def bound_of(module: Module, name: str) -> float:
    """The tolerance of a function's logits: its output dtype, longest weight row, and depth in linears' stages; where
    states hold codes, a key that was computed in another step may have become the neighbouring one."""
    graph = module.functions[name].graph
    output = next(n for n in graph.nodes if n.op == "output")
    dtypes = {n.meta["val"].dtype for n in graph.nodes if n.op == "get_attr" and n.meta["val"].is_floating_point()}
    dtype = max({output.args[0][0].meta["val"].dtype, *dtypes}, key=lambda d: torch.finfo(d).eps)
    reduction = max((w.shape[-1] for w in module.weights.values() if len(w.shape) > 1), default=1)
    layers = sum("attention" in str(n.target) for n in graph.nodes if n.op == "call_function")
    codes = {getattr(torch, s.dtype) for g in module.states for s in g.states if s.scales is not None}
    return tolerance(dtype, reduction, depth=max(1, 2 * layers)) + max(map(code_step, codes), default=0.0)


def first_divergence(
    graph: fx.Graph, before: Mapping[str, Any], after: Mapping[str, Any], bound: float
) -> fx.Node | None:
    """The first node whose value changed, or the newest node feeding it when the pass put that one there."""
    for node in graph.nodes:
        if node.name not in before or node.name not in after:
            continue
        old, new = before[node.name], after[node.name]
        if old.shape == new.shape and row_error(new, old) > bound:
            fresh = [n for n in upstream(node, before) if n.target is not operator.getitem]
            return max(fresh, default=node)
    fresh = [n for n in graph.nodes if n.op == "call_function" and n.name not in before]
    return fresh[-1] if fresh else None


def upstream(node: fx.Node, known: Mapping[str, Any]) -> set[fx.Node]:
    """Calls the pass added that reach the node through nothing but added calls."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            value = source.meta.get("val")
            is_new = source.op == "call_function" and source.name not in known and not isinstance(value, torch.SymInt)
            if is_new and source not in found:
                found.add(source)
                stack.append(source)
    return found


def drift_error(pass_: Pass, function: str, node: fx.Node | None, what: str) -> DriftError:
    """The error naming pass, function, node and scope."""
    place = f"pass {pass_.name}, function {function}"
    if node is not None:
        scope = node.meta.get("scope")
        place += f", node {node.name}" + (f" ({scope})" if scope else "")
    return DriftError(what, where=place)
