"""Choosing one option a layer under a budget: least loss for a size, or least size for a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """A way to store a layer: bytes, and the loss expected of it. ``label`` says which (``4 bits, groups of 128``)."""

    label: str
    size: float
    loss: float


@dataclass(frozen=True)
class Point:
    """One choice for each layer: indices into their options, with the sums of sizes and losses."""

    chosen: tuple[int, ...]
    size: float
    loss: float


def pareto(layers: Sequence[Sequence[Option]]) -> list[Point]:
    """The front from all layers at their smallest to all at their least loss, one layer changed from point to point.

    Steps are taken in the order of loss saved a byte along each layer's lower convex hull: every point is the best of
    its size among all choices (the optimum of the relaxed problem is one of its neighbours).
    """
    hulls = [hull(options) for options in layers]
    steps = []
    for index, corners in enumerate(hulls):
        for here, there in pairwise(corners):
            a, b = layers[index][here], layers[index][there]
            steps.append(((a.loss - b.loss) / (b.size - a.size), index, there))
    chosen = [corners[0] for corners in hulls]
    points = [total(layers, chosen)]
    for _, index, there in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        chosen[index] = there
        points.append(total(layers, chosen))
    return points


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of (size, loss), by rising size and falling loss."""
    order = sorted(range(len(options)), key=lambda i: (options[i].size, options[i].loss))
    kept: list[int] = []
    for index in order:
        found = options[index]
        if kept and found.loss >= options[kept[-1]].loss:
            continue
        while len(kept) > 1 and not convex(options[kept[-2]], options[kept[-1]], found):
            kept.pop()
        kept.append(index)
    return kept


def convex(a: Option, b: Option, c: Option) -> bool:
    """Whether ``b`` lies below the line from ``a`` to ``c``."""
    return (a.loss - b.loss) * (c.size - b.size) > (b.loss - c.loss) * (b.size - a.size)


def total(layers: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Point:
    """The sums of a choice."""
    found = [options[index] for options, index in zip(layers, chosen)]
    return Point(tuple(chosen), sum(o.size for o in found), sum(o.loss for o in found))


def choose(front: Sequence[Point], size: float | None, loss: float | None) -> Point | None:
    """The first point of a front within ``loss``, or with none given the last within ``size``; None when there is none.

    With both, the point within ``loss`` must be within ``size`` as well.
    """
    if loss is not None:
        found = next((point for point in front if point.loss <= loss), None)
        return found if found is not None and (size is None or found.size <= size) else None
    fits = [point for point in front if size is None or point.size <= size]
    return fits[-1] if fits else None
