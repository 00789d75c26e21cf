"""Contracts of a target: what it can do, what it emits, and the executor it pairs with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from llmopt.program import Program, TensorType


class LinearTimes(Protocol):
    """Measured times of linears: of one row, over a weight (n, k)."""

    def __call__(self, n: int, k: int, dtype: str, bits: int | None, group: int) -> float | None:
        """Microseconds over a weight of ``dtype``, or with ``bits`` over integers that share a scale in groups of
        ``group`` columns; None when that shape was never measured."""
        ...


@dataclass(frozen=True)
class TargetInfo:
    """What passes may know of a target.

    ``functions``: the functions a module forks into: ``("step",)`` when one function serves decode and
    prefill, else ``("decode", "extend")``. ``layouts``: KV layouts it can run. ``dtypes``: compute dtypes.
    ``quant_bits``: weight bit widths of ``llmopt.linear_q`` it supports; ``quant_experts``: of
    ``llmopt.moe_experts_q`` as well; ``quant_embeddings``: of ``llmopt.embedding_q`` as well. ``quant_formats``:
    formats of its codes. ``activation_formats``: formats of ``llmopt.round_activations``. ``kv_formats``: formats of
    quantized KV states, int8 and fp8_e4m3. ``linear_us``: microseconds measured of a linear of one row, see
    LinearTimes.
    """

    name: str
    functions: tuple[str, ...] = ("step",)
    layouts: tuple[str, ...] = ("slots",)
    dtypes: tuple[str, ...] = ("float32",)
    quant_bits: tuple[int, ...] = ()
    quant_experts: bool = False
    quant_embeddings: bool = False
    quant_formats: tuple[str, ...] = ("int",)
    activation_formats: tuple[str, ...] = ()
    kv_formats: tuple[str, ...] = ()
    linear_us: LinearTimes = lambda n, k, dtype, bits, group: None


class WeightReader(Protocol):
    """A lazily materialized tensor: rows of axis 0 on demand, as numpy (bfloat16 and fp8 as ml_dtypes')."""

    @property
    def type(self) -> TensorType:
        """Shape and dtype."""
        ...

    def chunks(self, max_bytes: int) -> Iterator[npt.NDArray[Any]]:
        """The tensor's rows in order, each chunk at most ``max_bytes`` (one row at least)."""
        ...


@dataclass(frozen=True)
class TargetFiles:
    """What a target emitted. ``files``: written into the artifact; ``weights``: streamed to weights.safetensors;
    ``notes``: kept in the manifest; ``log``: what only this build's log may say (caches, times), never the artifact."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    weights: Mapping[str, WeightReader] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    log: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildContext:
    """What a build may use. ``options``: the recipe's ``target_options``, validated by the target."""

    options: Mapping[str, Any]
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


class Target(Protocol):
    """A backend: one folder under targets/, exposing ``TARGET`` in its target.py."""

    name: str
    info: TargetInfo

    def build(self, program: Program, weights: Mapping[str, WeightReader], ctx: BuildContext) -> TargetFiles:
        """Emit the files for a program. Raises TargetError naming the call it cannot emit."""
        ...


class WeightStore(Protocol):
    """Where an executor takes its weights from at load: a file, a digest-checked directory, or a seed."""

    def names(self) -> tuple[str, ...]:
        """Names of all weights."""
        ...

    def get(self, name: str) -> npt.NDArray[Any]:
        """The tensor, mapped read-only where possible (bfloat16 and fp8 as ml_dtypes)."""
        ...

    def dtype(self, name: str) -> str:
        """The tensor's dtype name."""
        ...


@dataclass(frozen=True)
class LoadOptions:
    """How to load an executor: device, threads, and how much state to reserve."""

    device: str = "cpu"
    threads: int = 0
    max_sequences: int = 8
    max_context: int | None = None
    kv_bytes: int | None = None


__all__ = [
    "BuildContext",
    "LinearTimes",
    "LoadOptions",
    "Target",
    "TargetFiles",
    "TargetInfo",
    "WeightReader",
    "WeightStore",
]
