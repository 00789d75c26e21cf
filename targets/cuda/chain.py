"""Linears of one row over codes that follow each other, joined into one call: ``cuda.linear_chain``.

Its arguments are ``count``, the first linear's input ``x``, ``round`` (the format activations are rounded to, or None),
what the linears share (``bits``, ``format``, ``block_k``: None for a scale a row) and, of linear i, ``i/codes`` and the
like: its weight, the RMSNorm before it, its gate, and its residual, an earlier linear's number where it is that one's
output. Its outputs are the linears'. ADR 37 has the reasons.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llmopt.program import Function, OpCall, Ref

from .eight_bits import LINEAR_8, NORM_ROUNDED, QUANTIZED, ROUNDED
from .fusion import ABSENT, LINEAR_Q, NORM
from .graph import Graph

CHAIN = "cuda.linear_chain"
ARCHS = (90,)
"""Architectures where chains were measured."""
MOST_LINEARS = 4
"""Of a chain: output projection, gate and up, down, and the next layer's query, key and value."""
ROWS, COLUMNS = 16, 128
"""Outputs and columns are whole multiples of these."""
ALONE = {**ABSENT, "mul_in_fp32": False}
LINK = ("codes", "scales", "bias", "input_scale", *ALONE)
"""What a chain holds of each linear."""


@dataclass(frozen=True)
class Link:
    """A linear that a chain may hold: where it is, the calls before it that it takes along, the value it reads, what
    it must have in common with the others, and its arguments."""

    at: int
    taken: tuple[int, ...]
    source: str
    shared: tuple[tuple[str, Any], ...]
    args: Mapping[str, Any]
    output: str


def chained(function: Function, dims: Mapping[str, int], ops: Collection[str], arch: int) -> Function:
    """A function after fusion.py's rules, its chains in place where it decodes one row: linears of which each reads
    what the one before it made, and nothing else needs before the last."""
    if function.name != "decode" or dims["T"] != 1 or CHAIN not in ops or arch not in ARCHS:
        return function
    graph = Graph(function)
    open_chains: dict[str, list[Link]] = {}
    chains: list[list[Link]] = []
    for at in range(len(graph.calls)):
        link = link_at(graph, at)
        if link is None:
            continue
        chain = open_chains.pop(link.source, [])
        if not chain or chain[0].shared != link.shared or len(chain) == MOST_LINEARS:
            chains.append(chain := [])
        chain.append(link)
        open_chains[link.output] = chain
    for chain in chains:
        if len(chain) > 1 and in_one_piece(graph, chain):
            for link in chain:
                for at in (link.at, *link.taken):
                    graph.places[at] = ()
            graph.places[chain[-1].at] = (joined(graph, chain),)
    return graph.finish()


def link_at(graph: Graph, at: int) -> Link | None:
    """The linear of a call, if a chain may hold it: symmetric codes with a scale a row, or a row and group. Those of 8
    bits only where they meet codes: over int8 weights an 8B model's step takes 2.42 ms in chains and 2.38 without, over
    FP8 weights 2.41 and 2.44 with registers spilled."""
    call = graph.calls[at]
    if call.op not in (QUANTIZED, LINEAR_Q, LINEAR_8):
        return None
    v: Any = {**ALONE, "zeros": None, "g_idx": None, **call.args}
    (output,), x = call.outputs, v["x"]
    n, k = (int(graph.types_of(name).shape[-1]) for name in (output, x.name))
    group = None if v["block_k"] >= k else v["block_k"]
    fits = n % ROWS == 0 == k % COLUMNS and (group is None or group % COLUMNS == 0 == k % group)
    known = v["format"] in ("int", "fp8_e4m3") and v["block_n"] == 1
    plain = v["zeros"] is None and v["g_idx"] is None and graph.types_of(output).dtype == "bfloat16"
    if not (fits and known and plain) or (v["bits"] == 8 and call.op != LINEAR_8):
        return None
    before = before_it(graph, call)
    if before is None:
        return None
    taken, source, extra = before
    if graph.types_of(source).dtype != "bfloat16":
        return None
    shared = {"bits": v["bits"], "format": v["format"], "block_k": group, "round": v.get("round")}
    args = {name: v.get(name) for name in LINK} | extra
    return Link(at, taken, source, tuple(shared.items()), args, output)


def before_it(graph: Graph, call: OpCall) -> tuple[tuple[int, ...], str, dict[str, Any]] | None:
    """What makes a linear's input and serves it alone: the calls, the value they read, and what they are to it. None
    for codes that something else reads, or that a linear's kernel cannot make."""
    x: Any = call.args["x"]
    if call.op == LINEAR_8:
        at, scale = graph.only_from(x, ROUNDED, NORM_ROUNDED), call.args["x_scale"]
        if at is None or not isinstance(scale, Ref):
            return None
        if graph.maker.get(scale.name) == at and graph.uses[scale.name] != 1:
            return None
        made: Any = graph.calls[at].args
        if graph.calls[at].op == ROUNDED:
            return ((at,), made["x"].name, {}) if made["gate"] is None else None
        normed = made["op"] == NORM and made["weight"] is not None
        return ((at,), made["x"].name, of_norm(made)) if normed else None
    found = graph.only_from(x, NORM)
    if found is None or graph.calls[found].args["weight"] is None:
        return (), x.name, {}
    norm: Any = graph.calls[found].args
    return (found,), norm["x"].name, of_norm(norm)


def of_norm(norm: Mapping[str, Any]) -> dict[str, Any]:
    """An RMSNorm as an argument of the linear after it."""
    return {"norm": norm["weight"], **{name: norm[name] for name in ("eps", "offset", "mul_in_fp32")}}


def in_one_piece(graph: Graph, chain: list[Link]) -> bool:
    """Whether the last linear's place serves all: what else reads an output of the others comes later."""
    inside = {at for link in chain for at in (link.at, *link.taken)}
    readers = {at for link in chain[:-1] for at in graph.readers.get(link.output, [])}
    return all(at > chain[-1].at for at in readers - inside)


def joined(graph: Graph, chain: list[Link]) -> OpCall:
    """The chain as one call."""
    numbers = {link.output: i for i, link in enumerate(chain)}
    args: dict[str, Any] = {"count": len(chain), "x": Ref(chain[0].source), **dict(chain[0].shared)}
    for i, link in enumerate(chain):
        residual = link.args["residual"]
        inner = numbers.get(residual.name, residual) if isinstance(residual, Ref) else None
        args |= {f"{i}/{name}": arg for name, arg in {**link.args, "residual": inner}.items()}
    last = graph.calls[chain[-1].at]
    return OpCall(CHAIN, args, tuple(link.output for link in chain), last.scope)
