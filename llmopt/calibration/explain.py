"""A choice of precision and its reasons, as report.json keeps them."""

from __future__ import annotations

from typing import Any

from llmopt.calibration.budget import Limit, Option, Point, hull, pareto, size_of

NOTHING = Point((), 0.0, 0.0)


def explain(
    options: dict[str, list[Option]], best: Point, limits: list[Limit], rest: Point, bandwidth: str | None
) -> dict[str, Any]:
    """The choice and its reasons, for report.json: every option of each layer, why it was taken, and the front."""
    front = pareto(list(options.values()), limits[0].cost if limits else size_of)
    layers = [
        {
            "name": name,
            "chosen": found[index].label,
            "why": reason(found, index),
            "options": [figures(o) | {"label": o.label} | timing(o, bandwidth) for o in found],
        }
        for (name, found), index in zip(options.items(), best.chosen)
    ]
    return {
        **figures(best, rest),
        "budgets": [limit.name for limit in limits],
        "bandwidth": bandwidth,
        "layers": layers,
        "front": [figures(p, rest) for p in front],
    }


def figures(found: Option | Point, rest: Point = NOTHING) -> dict[str, Any]:
    """Bytes, KL and milliseconds."""
    made = {"bytes": round(found.size + rest.size), "kl": float(f"{found.loss:.4g}")}
    return made | ({"ms": float(f"{found.ms + rest.ms:.4g}")} if found.ms else {})


def timing(found: Option, bandwidth: str | None) -> dict[str, str]:
    """Where an option's milliseconds come from, when any were asked for."""
    return {} if bandwidth is None else {"time": "measured" if found.measured else "modelled"}


def reason(found: list[Option], index: int) -> str:
    """Why an option was taken: what the next ones on the layer's hull would save and cost."""
    corners, taken = hull(found), found[index]
    smaller = [found[i] for i in corners if found[i].size < taken.size]
    larger = [found[i] for i in corners if found[i].size > taken.size]
    said = []
    if smaller:
        o = smaller[-1]
        said.append(
            f"{o.label} saves {(taken.size - o.size) / 1e6:.4g} MB and loses {o.loss - taken.loss:.3g} nats more"
        )
    if larger:
        o = larger[0]
        said.append(
            f"{o.label} takes {(o.size - taken.size) / 1e6:.4g} MB more and loses {taken.loss - o.loss:.3g} less"
        )
    return "; ".join(said)
