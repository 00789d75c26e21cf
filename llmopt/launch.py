"""LaunchPlan: what a cuda artifact executes: kernel launches with every extent resolved (stdlib only).

A plan holds one *bucket* for each batch size (decode) or row count (extend) that the runtime may run. Inside a
bucket all extents are integers; what changes from step to step (lengths, block tables, slots) lives in device
memory, so that a bucket can be captured as a CUDA graph once and replayed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from llmopt.errors import ArtifactError

FORMAT = 1


@dataclass(frozen=True)
class Pointer:
    """Address of a value: a weight, an input, a state, or an arena buffer, plus a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Scalar:
    """A by-value argument. ``type``: ``i32``, ``i64`` or ``fp32``."""

    type: str
    value: int | float


@dataclass(frozen=True)
class TensorMap:
    """A TMA descriptor over a row-major tensor: extents and byte strides (outermost first; the last stride is
    the element's size and omitted), the box a copy moves, and the swizzle in bytes (0, 32, 64, 128)."""

    name: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


Operand: TypeAlias = "Pointer | Scalar | TensorMap"
_OPERANDS = {"pointer": Pointer, "scalar": Scalar, "tensor_map": TensorMap}


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel. ``file`` is relative to the artifact and holds ``{arch}``; resources are per arch."""

    file: str
    symbol: str
    threads: int
    shared: dict[str, int]
    registers: dict[str, int]
    spills: dict[str, int]


@dataclass(frozen=True)
class Launch:
    """One kernel launch. ``pdl``: programmatic dependent launch after the one before it.

    ``bytes``: device memory it must move at least (its floor); ``scope`` the module path it came from.
    """

    kernel: str
    grid: tuple[int, int, int]
    args: tuple[Operand, ...]
    pdl: bool = False
    bytes: int = 0
    scope: str = ""


@dataclass(frozen=True)
class Bucket:
    """The launches for one set of extents (``dims``), and where each arena buffer lies (bytes).

    ``zeroed``: arena buffers that must hold zeros before the first launch (counters that kernels reset themselves).
    """

    function: str
    dims: dict[str, int]
    launches: tuple[Launch, ...]
    offsets: dict[str, int]
    arena_bytes: int
    zeroed: tuple[str, ...] = ()


@dataclass(frozen=True)
class LaunchPlan:
    """Everything the cuda executor runs. ``inputs``: dtype and shape of each step input at its largest."""

    archs: tuple[str, ...]
    kernels: dict[str, Cubin]
    buckets: tuple[Bucket, ...]
    block_table_width: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Canonical text: equal plans give equal bytes."""
        return json.dumps({"format": FORMAT, **asdict_typed(self)}, indent=None, separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: str) -> LaunchPlan:
        """Inverse of to_json. Raises ArtifactError when the text is not a launch plan of this format."""
        try:
            raw = json.loads(text)
            if (version := raw.pop("format")) != FORMAT:
                raise ArtifactError(f"expected launch plan format {FORMAT}, found {version}")
            return LaunchPlan(
                tuple(raw["archs"]),
                {name: Cubin(**k) for name, k in raw["kernels"].items()},
                tuple(_bucket(b) for b in raw["buckets"]),
                dict(raw["block_table_width"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"launch plan is malformed: {error!r}") from error


def asdict_typed(plan: LaunchPlan) -> dict[str, Any]:
    """``dataclasses.asdict`` with each operand tagged by its kind."""
    raw = asdict(plan)
    for bucket, raw_bucket in zip(plan.buckets, raw["buckets"]):
        for launch, raw_launch in zip(bucket.launches, raw_bucket["launches"]):
            raw_launch["args"] = [_tagged(arg) for arg in launch.args]
    return raw


def _tagged(operand: Operand) -> list[Any]:
    kind = next(k for k, cls in _OPERANDS.items() if isinstance(operand, cls))
    return [kind, *asdict(operand).values()]


def _bucket(raw: dict[str, Any]) -> Bucket:
    launches = tuple(
        Launch(**{**x, "grid": tuple(x["grid"]), "args": tuple(_operand(a) for a in x["args"])})
        for x in raw["launches"]
    )
    return Bucket(**{**raw, "launches": launches, "zeroed": tuple(raw["zeroed"])})


def _operand(raw: list[Any]) -> Operand:
    kind, *values = raw
    return _OPERANDS[kind](*(tuple(v) if isinstance(v, list) else v for v in values))  # type: ignore[no-any-return]
