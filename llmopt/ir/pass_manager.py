"""Passes and the manager that runs, refreshes, verifies, checks and records them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import fx

from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.samples import Calibration
from llmopt.ir.text import print_function
from llmopt.ir.verify import refresh, signature, verify
from llmopt.target import TargetInfo


@dataclass(frozen=True)
class PassContext:
    """What a pass may know beside the module: the target's abilities, the compute dtype, and calibration windows.

    ``shapes_only``: weights cannot be read (``llmopt plan``); calibrating passes then make shapes without windows.
    """

    target: TargetInfo
    dtype: torch.dtype
    calibration: Calibration | None = None
    shapes_only: bool = False


@dataclass(frozen=True)
class PassRecord:
    """What a pass did: rewrites made, nodes of all functions before and after, milliseconds of ``run`` alone."""

    name: str
    rewrites: int
    nodes_before: int
    nodes_after: int
    ms: float


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a module. Its dataclass fields are its recipe options; ``name`` is its file's stem.

    ``after``: passes that must run earlier when a recipe lists them at all. ``lossy``: the pass changes the
    numerics by design (quantization), so that checks report its error instead of failing. ``calibrates``: the pass
    reads calibration windows. ``expect``: the number of rewrites a recipe demands. ``functions``: the functions to
    serve (None: all).
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    lossy: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False

    expect: int | None = field(default=None, kw_only=True)
    functions: tuple[str, ...] | None = field(default=None, kw_only=True)

    @property
    def changes_numerics(self) -> bool:
        """Whether this instance's options change the numerics by design."""
        return self.lossy

    @property
    def needs_calibration(self) -> bool:
        """Whether this instance's options read ``ctx.calibration``."""
        return self.calibrates

    def requires(self, module: Module, ctx: PassContext) -> None:  # noqa: B027 (most passes need nothing)
        """Raise PassError when the module cannot take this pass, naming what must come before."""

    @abstractmethod
    def run(self, module: Module, ctx: PassContext) -> int:
        """Rewrite in place; returns the number of rewrites made."""

    def served(self, module: Module) -> Iterator[fx.GraphModule]:
        """The functions this pass rewrites. Raises PassError for one the module lacks."""
        for name in self.functions if self.functions is not None else tuple(module.functions):
            if name not in module.functions:
                known = ", ".join(module.functions)
                raise PassError(f"there is no function {name!r}", where=f"pass {self.name}", hint=f"known: {known}")
            yield module.functions[name]


class Check(Protocol):
    """Something that watches passes: called with the module before the first and after each one."""

    def start(self, module: Module) -> None:
        """Before the first pass."""
        ...

    def after(self, pass_: Pass, module: Module) -> None:
        """After a pass; raises DriftError when it changed the numerics."""
        ...


class PassManager:
    """Runs passes in order: requires, run, refresh of ``meta["val"]``, verify, check, record.

    ``dump_dir`` receives ``NN-<pass>.<function>.txt`` after each pass (``00-captured`` before the first).
    """

    def __init__(self, dump_dir: Path | None = None, check: Check | None = None) -> None:
        self.dump_dir, self.check = dump_dir, check
        self.dumped = 0

    def run(self, module: Module, passes: Sequence[Pass], ctx: PassContext) -> list[PassRecord]:
        """Run all passes on the module, in place. Raises PassError (DriftError from the check)."""
        check_order(passes)
        verify(module)
        if not self.dumped:
            self._dump(module, "captured")
        if self.check is not None:
            self.check.start(module)
        return [self._step(module, pass_, ctx) for pass_ in passes]

    def _step(self, module: Module, pass_: Pass, ctx: PassContext) -> PassRecord:
        where = f"pass {pass_.name}"
        pass_.requires(module, ctx)
        before, shape_before = count_nodes(module), signature(module)
        start = time.perf_counter()
        rewrites = pass_.run(module, ctx)
        ms = (time.perf_counter() - start) * 1e3
        try:
            refresh(module)
            verify(module, shape_before)
        except PassError as error:
            raise PassError(error.what, where=f"{where}, {error.where}", hint=error.hint) from error
        if pass_.expect is not None and rewrites != pass_.expect:
            raise PassError(f"made {rewrites} rewrites, the recipe expects {pass_.expect}", where=where)
        self._dump(module, pass_.name)
        if self.check is not None:
            self.check.after(pass_, module)
        return PassRecord(pass_.name, rewrites, before, count_nodes(module), ms)

    def _dump(self, module: Module, name: str) -> None:
        if self.dump_dir is not None:
            self.dump_dir.mkdir(parents=True, exist_ok=True)
            for function in module.functions:
                path = self.dump_dir / f"{self.dumped:02d}-{name}.{function}.txt"
                path.write_text(print_function(module, function), encoding="utf-8")
        self.dumped += 1


def check_order(passes: Sequence[Pass]) -> None:
    """Raise PassError naming the pass that must come before another one of the list."""
    for index, pass_ in enumerate(passes):
        late = [p.name for p in passes[index + 1 :] if p.name in pass_.after]
        if late:
            raise PassError(f"{late[0]} must come before {pass_.name}", where=f"pass {pass_.name}")


def split_at_fork(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass]]:
    """Passes that run on the captured function, and those from the first with ``functions`` on (after the fork)."""
    first = next((i for i, p in enumerate(passes) if p.functions is not None), len(passes))
    return list(passes[:first]), list(passes[first:])


def count_nodes(module: Module) -> int:
    """Calls over all functions (placeholders, weights and outputs excluded)."""
    return sum(n.op == "call_function" for f in module.functions.values() for n in f.graph.nodes)
