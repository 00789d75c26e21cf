"""What every calibrating pass does: checks, groups of linears in walking order, results kept for a resumed run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from llmopt.calibration.moments import Moments, measure
from llmopt.calibration.spool import SavedSet, Spool
from llmopt.calibration.walk import Walk
from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.samples import Calibration
from llmopt.ir.sites import Site, by_input, layer_name
from llmopt.ir.text import print_function
from llmopt.ir.weights import Weight


def require_calibration(pass_: Pass, module: Module, ctx: PassContext) -> None:
    """Raise PassError unless there are token windows, and one function without KV states to run them through."""
    where = f"pass {pass_.name}"
    if ctx.calibration is None and not ctx.shapes_only:
        raise PassError("there is no calibration text", where=where, hint="give --calibration FILE")
    if len(list(pass_.served(module))) > 1 or module.states:
        raise PassError("calibration needs one function without KV states", where=where, hint="list it earlier")


@dataclass
class Group:
    """Linears that read one input, or one call of experts, with the walk standing before the first of them.

    What it computes is on the walk's device, what it saves on none.
    """

    index: int
    sites: list[Site]
    walk: Walk
    layer: str

    @property
    def input(self) -> fx.Node:
        """What they read, (..., T, K)."""
        return self.sites[0].input

    def rows(self) -> Iterator[Tensor]:
        """The input's rows (T, K), fp32, window by window. Raises PassError naming the layer for NaN and infinity."""
        for value in self.walk.values(self.input):
            yield require_finite(value.reshape(-1, value.shape[-1]).float(), self.layer)

    def values_of(self, weight: Weight) -> Tensor:
        """A weight, fp32."""
        return weight.tensor(self.walk.device).float()

    def expert(self, weight: Weight, index: int) -> Tensor:
        """An expert's matrix (N, K) or bias (N,) of a stack, fp32."""
        return weight.read(index, index + 1)[0].to(self.walk.device).float()

    def saved(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> SavedSet:
        """A named result of this group, computed unless an earlier run left it."""
        return self.walk.spool.saved(f"group{self.index}-{name}", compute)


def spool_of(pass_: Pass, module: Module, function: fx.GraphModule, calibration: Calibration, options: str) -> Spool:
    """Where a pass keeps what it computes; ``options``: those of its own that the results depend on."""
    text = print_function(module, next(name for name, found in module.functions.items() if found is function))
    state = f"{calibration.key}\n{options}\n{calibration.windows.tolist()}\n{module.precision}\n{text}"
    digest = hashlib.sha256(state.encode()).hexdigest()
    return Spool(calibration.folder / f"{pass_.name}-{digest[:16]}", digest)


def walk_groups(
    pass_: Pass, module: Module, function: fx.GraphModule, sites: list[Site], calibration: Calibration
) -> Iterator[Group]:
    """The sites' groups in program order, each with its activations ready.

    A consumer rewrites a group before it takes the next one: later activations come from what was put in.
    """
    spool = spool_of(pass_, module, function, calibration, repr(pass_))
    groups = by_input(sites)
    walk = Walk(module, function, calibration, spool, len(groups), pass_.name)
    for index, group in enumerate(groups):
        layer = layer_name(module, group[0].weights[0])
        walk.advance(group[0].node)
        yield Group(index, group, walk, layer)


class Statistics:
    """Moments of a group's inputs over all windows: computed in one reading, when first asked for."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._found: Moments | None = None

    @property
    def moments(self) -> Moments:
        """Of the input's K channels."""
        if self._found is None:
            width = int(self.group.input.meta["val"].shape[-1])
            self._found = measure(self.group.rows(), width, self.group.walk.device)
        return self._found

    @property
    def gram(self) -> Tensor:
        """Sum of x xᵀ over rows, (K, K) fp32."""
        return self.moments.gram

    @property
    def magnitude(self) -> Tensor:
        """Mean |x| of each channel, (K,)."""
        return self.moments.magnitude

    @property
    def largest(self) -> Tensor:
        """Largest |x| of each channel, (K,)."""
        return self.moments.largest

    def divide(self, scale: Tensor) -> None:
        """Follow a rescaling of the group's input by 1 / ``scale`` (K,)."""
        if self._found is not None:
            self._found = self._found.divided(scale.to(self._found.gram.device))


def require_finite(rows: Tensor, layer: str) -> Tensor:
    """The rows; raises PassError naming the layer for NaN and infinity."""
    if not bool(rows.isfinite().all()):
        raise PassError("the activations hold NaN or infinity", where=f"calibration, layer {layer}")
    return rows
