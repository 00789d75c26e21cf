"""Choosing one option a layer under budgets: least loss for a size or time, or least size for a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

MIXTURES = 17
"""Fronts that are looked at when two budgets must hold."""


@dataclass(frozen=True)
class Option:
    """A way to store a layer: bytes, and the loss expected of it. ``label`` says which (``4 bits, groups of 128``).

    ``ms``: what it takes a token, ``measured`` on the target or modelled.
    """

    label: str
    size: float
    loss: float
    ms: float = 0.0
    measured: bool = False


@dataclass(frozen=True)
class Point:
    """One choice for each layer: indices into their options, with the sums of sizes, losses and milliseconds."""

    chosen: tuple[int, ...]
    size: float
    loss: float
    ms: float = 0.0


Cost = Callable[[Option | Point], float]


@dataclass(frozen=True)
class Limit:
    """A budget: its ``name`` (``size 5GB``), what it counts, in which ``unit``, and the most there may be of it."""

    name: str
    cost: Cost
    unit: str
    most: float


def size_of(found: Option | Point) -> float:
    """Bytes."""
    return found.size


def ms_of(found: Option | Point) -> float:
    """Milliseconds a token."""
    return found.ms


def pareto(layers: Sequence[Sequence[Option]], cost: Cost = size_of) -> list[Point]:
    """The front from all layers at their cheapest to all at their least loss, one layer changed from point to point.

    Steps are taken in the order of loss saved for the cost along each layer's lower convex hull: every point is the
    best of its cost among all choices (the optimum of the relaxed problem is one of its neighbours).
    """
    hulls = [hull(options, cost) for options in layers]
    steps = []
    for index, corners in enumerate(hulls):
        for here, there in pairwise(corners):
            a, b = layers[index][here], layers[index][there]
            steps.append(((a.loss - b.loss) / (cost(b) - cost(a)), index, there))
    chosen = [corners[0] for corners in hulls]
    points = [total(layers, chosen)]
    for _, index, there in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        chosen[index] = there
        points.append(total(layers, chosen))
    return points


def hull(options: Sequence[Option], cost: Cost = size_of) -> list[int]:
    """Indices of the options on the lower convex hull of (cost, loss), by rising cost and falling loss."""
    order = sorted(range(len(options)), key=lambda i: (cost(options[i]), options[i].loss))
    kept: list[int] = []
    for index in order:
        found = options[index]
        if kept and found.loss >= options[kept[-1]].loss:
            continue
        while len(kept) > 1 and not convex(options[kept[-2]], options[kept[-1]], found, cost):
            kept.pop()
        kept.append(index)
    return kept


def convex(a: Option, b: Option, c: Option, cost: Cost = size_of) -> bool:
    """Whether ``b`` lies below the line from ``a`` to ``c``."""
    return (a.loss - b.loss) * (cost(c) - cost(b)) > (b.loss - c.loss) * (cost(b) - cost(a))


def total(layers: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Point:
    """The sums of a choice."""
    found = [options[index] for options, index in zip(layers, chosen)]
    return Point(tuple(chosen), sum(o.size for o in found), sum(o.loss for o in found), sum(o.ms for o in found))


def choose(front: Sequence[Point], limits: Sequence[Limit], loss: float | None) -> Point | None:
    """The point of a front within all limits with the least loss, or, given ``loss``, the smallest that loses no more.

    None when there is none.
    """
    fits = [point for point in front if all(limit.cost(point) <= limit.most for limit in limits)]
    if loss is not None:
        within = [point for point in fits if point.loss <= loss]
        return min(within, key=lambda p: (p.size, p.loss), default=None)
    return min(fits, key=lambda p: p.loss, default=None)


def solve(layers: Sequence[Sequence[Option]], limits: Sequence[Limit], loss: float | None) -> Point | None:
    """The best choice within all limits. With two of them, from fronts over MIXTURES weighted sums of what they count
    (Lagrangian relaxation): within both, and near the best."""
    found = [choose(pareto(layers, cost), limits, loss) for cost in costs(limits)]
    points = [point for point in found if point is not None]
    return min(points, key=lambda p: (p.loss, p.size) if loss is None else (p.size, p.loss), default=None)


def costs(limits: Sequence[Limit]) -> list[Cost]:
    """What to build fronts over: the one limit's cost, or mixtures of two, each in shares of its limit."""
    if len(limits) < 2:
        return [limits[0].cost if limits else size_of]
    a, b = limits

    def mixed(share: float) -> Cost:
        return lambda o: share * a.cost(o) / max(a.most, 1e-30) + (1 - share) * b.cost(o) / max(b.most, 1e-30)

    return [mixed(i / (MIXTURES - 1)) for i in range(MIXTURES)]


def unmet(layers: Sequence[Sequence[Option]], limits: Sequence[Limit]) -> tuple[Limit, float] | None:
    """The limit that no choice meets, by the largest share, and by how much the least choice exceeds it."""
    least = [sum(min(map(limit.cost, options)) for options in layers) for limit in limits]
    over = [(found - limit.most, limit) for found, limit in zip(least, limits) if found > limit.most]
    worst = max(over, key=lambda pair: pair[0] / max(abs(pair[1].most), 1e-30), default=None)
    return None if worst is None else (worst[1], worst[0])
