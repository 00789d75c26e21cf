"""Views without launches: which calls only rename memory, and where their results lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from llmopt.program import Arg, DimExpr, DType, Ref, eval_dim

from .kernel import Strided

Values = Mapping[str, Any]


def evaluate(arg: Arg, values: Mapping[str, Strided], dims: Mapping[str, int]) -> Any:
    """An argument with every extent resolved: Refs become Strided, dimension expressions int, dtypes their name."""
    match arg:
        case Ref(name):
            return values[name]
        case DimExpr(expr):
            return eval_dim(expr, dims)
        case DType(name):
            return name
        case tuple():
            return tuple(evaluate(item, values, dims) for item in arg)
    return arg


def resolve_view(op: str, args: Values) -> tuple[Strided, ...] | None:
    """Where the results of a call lie when it is a view of its first argument; None when it moves data.

    A reshape that strides cannot express moves data, and so does a clone of a tensor that isn't dense.
    """
    rule = RULES.get(op)
    source = next(iter(args.values()), None)
    if rule is None or not isinstance(source, Strided):
        return None
    found = rule(source, *list(args.values())[1:])
    return (found,) if isinstance(found, Strided) else found


def reshaped(x: Strided, shape: Sequence[int]) -> Strided | None:
    """``x`` under another shape (one extent may be -1), or None when its strides cannot express it.

    Each run of dimensions that is dense in itself may be regrouped: old and new extents are matched by product.
    """
    known = math.prod(d for d in shape if d != -1)
    target = tuple(math.prod(x.shape) // known if d == -1 else d for d in shape)
    old = [(d, s) for d, s in zip(x.shape, x.strides) if d != 1]
    strides: list[int] = []
    for extent in reversed(target):
        if extent == 1:
            strides.append(1 if not strides else strides[-1] * target[len(target) - len(strides)])
            continue
        while old and old[-1][0] < extent:
            if len(old) < 2 or old[-2][1] != old[-1][0] * old[-1][1]:
                return None
            (outer, _), (inner, stride) = old[-2:]
            old[-2:] = [(outer * inner, stride)]
        if not old or old[-1][0] % extent:
            return None
        inner, stride = old.pop()
        strides.append(stride)
        if inner != extent:
            old.append((inner // extent, stride * extent))
    return replace(x, shape=target, strides=tuple(reversed(strides)))


def permuted(x: Strided, order: Sequence[int]) -> Strided:
    """Dimensions in another order."""
    return replace(x, shape=tuple(x.shape[i] for i in order), strides=tuple(x.strides[i] for i in order))


def transposed(x: Strided, dim0: int, dim1: int) -> Strided:
    """Two dimensions exchanged."""
    order = list(range(len(x.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permuted(x, order)


def sliced(x: Strided, dim: int, start: int | None, end: int | None, step: int = 1) -> Strided:
    """Elements ``start:end:step`` of a dimension, with Python's rules for negative and missing bounds."""
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    shape, strides = list(x.shape), list(x.strides)
    shape[dim], strides[dim] = max(0, -(-(last - first) // step)), x.strides[dim] * step
    return replace(x, shape=tuple(shape), strides=tuple(strides), offset=x.offset + first * x.strides[dim])


def selected(x: Strided, dim: int, index: int) -> Strided:
    """One element of a dimension, which goes."""
    index %= x.shape[dim]
    one = sliced(x, dim, index, index + 1)
    return squeezed(one, (dim,))


def squeezed(x: Strided, dims: Sequence[int]) -> Strided:
    """Without the given dimensions where their extent is 1."""
    drop = {d % len(x.shape) for d in dims if x.shape[d] == 1}
    keep = [i for i in range(len(x.shape)) if i not in drop]
    return permuted(x, keep)


def unsqueezed(x: Strided, dim: int) -> Strided:
    """A dimension of extent 1 put before ``dim``."""
    at = dim % (len(x.shape) + 1)
    stride = x.strides[at] * x.shape[at] if at < len(x.shape) else 1
    return replace(x, shape=(*x.shape[:at], 1, *x.shape[at:]), strides=(*x.strides[:at], stride, *x.strides[at:]))


def expanded(x: Strided, shape: Sequence[int]) -> Strided:
    """Broadcast: dimensions of extent 1 repeat with stride 0."""
    missing = len(shape) - len(x.shape)
    old = (*[(1, 0)] * missing, *zip(x.shape, x.strides))
    pairs = [(d if e == -1 else e, s if e in (-1, d) else 0) for e, (d, s) in zip(shape, old)]
    return replace(x, shape=tuple(d for d, _ in pairs), strides=tuple(s for _, s in pairs))


def pieces(x: Strided, sizes: Sequence[int], dim: int) -> tuple[Strided, ...]:
    """Consecutive slices of a dimension."""
    starts = accumulate(sizes, initial=0)
    return tuple(sliced(x, dim, start, start + size) for start, size in zip(starts, sizes))


def split(x: Strided, size: int, dim: int = 0) -> tuple[Strided, ...]:
    """Slices of ``size``, the last one smaller."""
    extent = x.shape[dim]
    return pieces(x, [min(size, extent - at) for at in range(0, extent, size)], dim)


def flattened(x: Strided, start: int = 0, end: int = -1) -> Strided | None:
    """Dimensions ``start`` to ``end`` joined."""
    first, last = start % len(x.shape), end % len(x.shape)
    return reshaped(x, (*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :]))


def unflattened(x: Strided, dim: int, sizes: Sequence[int]) -> Strided | None:
    """A dimension split into several."""
    at = dim % len(x.shape)
    known = math.prod(s for s in sizes if s != -1)
    return reshaped(x, (*x.shape[:at], *(x.shape[at] // known if s == -1 else s for s in sizes), *x.shape[at + 1 :]))


def dense(x: Strided, *_: Any) -> Strided | None:
    """The value itself when it is dense already."""
    return x if x.contiguous else None


RULES: dict[str, Callable[..., Any]] = {
    f"aten.{op}": rule
    for op, rule in (
        ("view.default", reshaped),
        ("reshape.default", reshaped),
        ("_unsafe_view.default", reshaped),
        ("transpose.int", transposed),
        ("permute.default", permuted),
        ("t.default", lambda x: permuted(x, range(len(x.shape))[::-1])),
        ("unsqueeze.default", unsqueezed),
        ("squeeze.dim", lambda x, dim: squeezed(x, (dim,))),
        ("squeeze.dims", squeezed),
        ("slice.Tensor", lambda x, dim=0, start=None, end=None, step=1: sliced(x, dim, start, end, step)),
        ("narrow.default", lambda x, dim, start, length: sliced(x, dim, start, start + length)),
        ("select.int", selected),
        ("expand.default", lambda x, shape, implicit=False: expanded(x, shape)),
        ("split.Tensor", split),
        ("split_with_sizes.default", pieces),
        ("chunk.default", lambda x, chunks, dim=0: split(x, -(-x.shape[dim] // chunks), dim)),
        ("unflatten.int", unflattened),
        ("flatten.using_ints", flattened),
        ("alias.default", lambda x: x),
        ("detach.default", lambda x: x),
        ("contiguous.default", dense),
        ("clone.default", dense),
    )
}
