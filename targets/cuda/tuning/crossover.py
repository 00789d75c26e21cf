"""From how many rows on a quantized linear is no faster than the bfloat16 one, by the times that a table keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmopt.program import OpCall, Program, Ref

from . import Table, quantized_form

PLAIN = "bfloat16"


def crossovers(calls: Iterable[OpCall], program: Program, table: Table) -> list[dict[str, Any]]:
    """One entry a shape of the quantized linears among ``calls``: ``weights`` (a tuning key's format), ``n``, ``k``,
    and what ``crossover`` says of it."""
    shapes = {}
    for call in calls:
        codes = call.args.get("codes")
        if isinstance(codes, Ref) and "block_k" in call.args:
            n, k = (int(extent) for extent in program.weights[codes.name].type.shape)
            kind = quantized_form(call.args, k)
            shapes[kind, n, k] = {"weights": kind, "n": n, "k": k}
    return [{**shapes[at], **crossover(table, *at)} for at in sorted(shapes)]


def crossover(table: Table, kind: str, n: int, k: int) -> dict[str, Any]:
    """``rows``: the fewest measured rows from which on bfloat16 takes no longer, None when it always does; ``us``: by
    rows, the fastest quantized and bfloat16 kernel of this very shape, whatever is joined to it; empty where not both
    are measured."""
    ours, plain = times(table, kind, n, k), times(table, PLAIN, n, k)
    both = {m: (ours[m], plain[m]) for m in sorted(ours.keys() & plain.keys())}
    slower = [m for m in both if all(b <= a for rows, (a, b) in both.items() if rows >= m)]
    return {"rows": min(slower, default=None), "us": {str(m): list(pair) for m, pair in both.items()}}


def times(table: Table, kind: str, n: int, k: int) -> Mapping[int, float]:
    """Microseconds of the fastest kernel over weights of a kind and shape, by rows."""
    found: dict[int, float] = {}
    for entries in table.values():
        for key, config in entries.items():
            known, extents, *_ = key.split(" ")
            if known == kind and "us" in config and extents.endswith(f"x{n}x{k}"):
                m = int(extents.partition("x")[0])
                found[m] = min(config["us"], found.get(m, config["us"]))
    return found
