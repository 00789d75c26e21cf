"""The coverage ledger: what share of a step's FLOPs and bytes the compiler knows, and where it does not."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
COMPILED_ATEN = {"embedding", "index_select", "linear", "layer_norm"}
VIEWS = {
    "view", "reshape", "transpose", "permute", "t", "slice", "split", "split_with_sizes", "chunk", "unsqueeze",
    "squeeze", "expand", "select", "flatten", "_unsafe_view", "unbind", "getitem",
}  # fmt: skip
EXPERT_MATRICES = {"moe_experts": (3, 4), "moe_experts_q": (3, 6)}
"""Positions of the gate_up and down matrices (or their codes) among the arguments."""
ROWS = 128


@dataclass(frozen=True)
class Entry:
    """One node: its class, cost at ROWS rows of one sequence, and where it came from."""

    node: str
    op: str
    scope: str
    kind: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Ledger:
    """Costs by node, at ``rows`` rows.

    ``kind`` is ``compiled`` (llmopt ops, linear, embedding, norms, and views, which cost nothing), ``generic`` (other
    aten ops, lowered one by one) or ``eager`` (not captured; capture is strict and raises instead, so it is 0).
    """

    entries: tuple[Entry, ...]
    rows: int = ROWS

    def shares(self, what: str) -> dict[str, float]:
        """Share of ``flops`` or ``bytes`` by kind; sums to 1 (all 0 for an empty graph)."""
        sums = dict.fromkeys(("compiled", "generic", "eager"), 0)
        for entry in self.entries:
            sums[entry.kind] += getattr(entry, what)
        total = sum(sums.values())
        return {kind: value / total if total else 0.0 for kind, value in sums.items()}

    def gaps(self) -> list[dict[str, Any]]:
        """What is not compiled: one line an op and scope (layer numbers as *), costliest first."""
        found: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        for e in self.entries:
            if e.kind != "compiled":
                line = found[e.kind, e.op, re.sub(r"\.\d+(?=\.|$)", ".*", e.scope)]
                line[0] += 1
                line[1] += e.flops
                line[2] += e.bytes
        rows = [
            {"kind": kind, "op": op, "scope": scope, "nodes": n, "flops": flops, "bytes": size}
            for (kind, op, scope), (n, flops, size) in found.items()
        ]
        return sorted(rows, key=lambda r: (-r["bytes"], -r["flops"], r["scope"], r["op"]))

    def to_json(self) -> dict[str, Any]:
        """Shares of FLOPs and bytes, totals, node counts and every gap."""
        kinds = [e.kind for e in self.entries]
        return {
            "rows": self.rows,
            "nodes": {kind: kinds.count(kind) for kind in ("compiled", "generic", "eager")},
            "flops": {"total": sum(e.flops for e in self.entries), **self.shares("flops")},
            "bytes": {"total": sum(e.bytes for e in self.entries), **self.shares("bytes")},
            "gaps": self.gaps(),
        }


def take_ledger(graph: fx.Graph) -> Ledger:
    """Costs of a captured graph."""
    return Ledger(tuple(entry(node) for node in graph.nodes if node.op == "call_function"))


def entry(node: fx.Node) -> Entry:
    """The ledger line of a node."""
    name = op_name(node)
    base = name.partition(".")[2].partition(".")[0] if "." in name else name
    compiled = name.startswith("llmopt.") or base in COMPILED_ATEN or base in VIEWS or base.startswith("sym_")
    kind = "compiled" if compiled else "generic"
    return Entry(node.name, name, node.meta.get("scope", ""), kind, flops(node, base), traffic(node, base))


def traffic(node: fx.Node, base: str) -> int:
    """Bytes a node reads and writes; of gathered tables and of KV states only the rows it touches."""
    writes = node.meta.get("val")
    match base:
        case "embedding" | "embedding_q" | "index_select":
            return 2 * nbytes(writes)
        case "moe_experts" | "moe_experts_q":
            return moe_bytes(node, base)
        case "kv_write" | "rope_kv_write":
            rows = node.args[2:4] if base == "kv_write" else node.args[:3]
            width = value_of(node.args[0 if base == "kv_write" else 5]).dtype.itemsize
            return sum(nbytes(value_of(n)) + math.prod(sizes(value_of(n))) * width for n in rows)
        case "cached_attention":
            state, count = value_of(node.args[1]), argument(node, 0)[2]
            _, heads, _, depth = sizes(state)
            return 2 * count * heads * depth * int(state.dtype.itemsize) + 2 * nbytes(writes)
    if base in VIEWS:
        return 0
    return sum(nbytes(v) for v in [*(n.meta.get("val") for n in node.all_input_nodes), writes])


def op_name(node: fx.Node) -> str:
    """``llmopt.rope`` or ``aten.add``."""
    if isinstance(node.target, torch._ops.OpOverload):
        name: str = node.target.name()  # type: ignore[no-untyped-call]
        return name.replace("::", ".").partition(".Tensor")[0]
    return getattr(node.target, "__name__", str(node.target))


def concrete(dim: Any) -> int:
    """A dim with every symbol set to ROWS."""
    if isinstance(dim, torch.SymInt):
        return int(dim.node.expr.subs(dict.fromkeys(dim.node.expr.free_symbols, ROWS)))
    return int(dim)


def sizes(value: Any) -> list[int]:
    """Concrete shape of a tensor value."""
    return [concrete(d) for d in value.shape]


def nbytes(value: Any) -> int:
    """Bytes of a value, or of all values of a tuple."""
    if isinstance(value, tuple | list):
        return sum(nbytes(v) for v in value)
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(sizes(value)) * value.dtype.itemsize


def value_of(node: Any) -> Any:
    """The fake value of an argument."""
    return node.meta["val"]


def argument(node: fx.Node, index: int) -> list[int]:
    """Concrete shape of a tensor argument."""
    return sizes(value_of(node.args[index]))


def flops(node: fx.Node, base: str) -> int:
    """Multiplications and additions of a node (an elementwise op counts one an element)."""
    value = node.meta.get("val")
    if base in VIEWS or base in ("embedding", "embedding_q") or not isinstance(value, torch.Tensor | tuple | list):
        return 0
    if base in ("linear", "linear_q"):
        return 2 * math.prod(argument(node, 0)) * argument(node, 1)[0]
    if base in ("mm", "bmm", "matmul", "addmm"):
        left = argument(node, 1 if base == "addmm" else 0)
        return 2 * math.prod(sizes(value)) * left[-1]
    if base in ("attention", "cached_attention"):
        (_, heads, rows, width), depth = argument(node, 0), argument(node, 2)[3]
        window: Any = node.args[5 if base == "attention" else 8] or rows
        pairs = sum(min(i + 1, window) for i in range(rows))
        return int(2 * heads * pairs * (width + depth))
    if base in EXPERT_MATRICES:
        rows, chosen = argument(node, 1)
        return 2 * rows * chosen * sum(math.prod(argument(node, i)[1:]) for i in EXPERT_MATRICES[base])
    first = value[0] if isinstance(value, tuple | list) else value
    return math.prod(sizes(first))


def moe_bytes(node: fx.Node, base: str) -> int:
    """Bytes of the experts at least one of the rows can reach, plus activations."""
    rows, chosen = argument(node, 1)
    total = argument(node, 3)[0]
    weights = sum(nbytes(value_of(node.args[i])) for i in EXPERT_MATRICES[base])
    return weights * min(total, rows * chosen) // total + 2 * nbytes(node.meta["val"])
