"""LaunchPlan: what a cuda artifact executes: kernel launches with every extent resolved (stdlib only).

A plan serves one GPU architecture. It holds one *bucket* for each batch size (decode) or row count (extend) that
the runtime may run. Inside a bucket all extents are integers; what changes from step to step (lengths, block
tables, slots) lives in device memory, so that a bucket can be captured as a CUDA graph once and replayed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias

from llmopt.errors import ArtifactError
from llmopt.program import Program, TensorType

FORMAT = 3

SAMPLING_RECORD = {
    "temperature": (0, "float32"), "inverse_temperature": (1, "float32"), "min_p": (2, "float32"),
    "top_k": (3, "int32"), "repetition": (4, "float32"), "presence": (5, "float32"), "frequency": (6, "float32"),
    "logprobs": (7, "int32"), "biases": (8, "int32"), "seed": (10, "uint64"), "top_p": (12, "float64"),
}  # fmt: skip
"""First word and dtype of each field in a sequence place's sampling record. ``logprobs``: alternatives to report, -1
for no report; ``biases``: entries used of its row of biases."""

RECORD_WORDS = 16
MAX_BIASES = 1024
MAX_ALTERNATIVES = 20
REPORT_WORDS = 1 + 2 * MAX_ALTERNATIVES
"""A row of the report: the token's log-probability, ids of the alternatives, their log-probabilities (int32, fp32)."""


def plan_file(arch: int) -> str:
    """Name of an architecture's plan inside the artifact: ``launch/sm_90.json``."""
    return f"launch/sm_{arch}.json"


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
    """A TMA descriptor over a strided tensor: extents and byte strides (outermost first, the innermost stride, the
    element's size, included), the box a copy moves, and the swizzle in bytes (0, 32, 64, 128).

    Triton kernels take the descriptor, then the extents (i32), then the strides in elements (i64): three kinds of
    parameters for one operand.
    """

    name: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


Operand: TypeAlias = "Pointer | Scalar | TensorMap"
_OPERANDS = {"pointer": Pointer, "scalar": Scalar, "tensor_map": TensorMap}
_TAGS = {cls: tag for tag, cls in _OPERANDS.items()}


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: ``file`` inside the artifact, entry ``symbol``, threads a block, dynamic shared memory,
    and what the assembler gave it (registers a thread, bytes of local memory)."""

    file: str
    symbol: str
    threads: int
    shared: int
    registers: int
    spills: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch. ``pdl``: programmatic dependent launch after the one before it.

    ``bytes``: device memory it must move at least (its floor); ``scope`` the module path it came from. ``resident``:
    its programs wait for each other, so that all must run at once, one a multiprocessor.
    """

    kernel: str
    grid: tuple[int, int, int]
    args: tuple[Operand, ...]
    pdl: bool = False
    bytes: int = 0
    scope: str = ""
    resident: bool = False


@dataclass(frozen=True)
class View:
    """A tensor the host reads or writes: where it lies, dtype, extents, strides in elements; offset in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Bucket:
    """The launches for one set of extents (``dims``), and where each arena buffer lies (bytes).

    ``inputs``: what the host sends before a run, states apart. ``greedy``: the launches that draw each row's largest
    of the ``logits`` (M, V) into ``sampled`` (M,); ``sampling``: those that draw as the places' records say, and write
    ``reports`` (M, REPORT_WORDS) too. They are apart from the rest so that a grammar mask holds up only them; what
    they write stays until the next run. ``zeroed``: arena ranges (offset, bytes) that must hold zeros before the first
    launch of any bucket; kernels leave zeros there, and no bucket puts anything else there.
    """

    function: str
    dims: dict[str, int]
    inputs: dict[str, View]
    launches: tuple[Launch, ...]
    greedy: tuple[Launch, ...]
    sampling: tuple[Launch, ...]
    offsets: dict[str, int]
    arena_bytes: int
    logits: View
    sampled: View
    reports: View
    zeroed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class LaunchPlan:
    """Everything the cuda executor runs on one architecture. ``persistent``: buffers that outlive steps, zero at first,
    a row for each sequence place: ``last_tokens`` drawn; ``records``, ``history``, ``bias_ids`` and ``bias_values`` of
    sampling; and ``masks``, a row for each masked row of a step. ``packed``: types of the weights that are stored in
    another form than the program's."""

    arch: int
    kernels: dict[str, Cubin]
    buckets: tuple[Bucket, ...]
    persistent: dict[str, View] = field(default_factory=dict)
    packed: dict[str, TensorType] = field(default_factory=dict)

    def stored(self, program: Program) -> Program:
        """The program with its weights as they are stored and lie on the device."""
        types = {name: replace(program.weights[name], type=kind) for name, kind in self.packed.items()}
        return replace(program, weights={**program.weights, **types})

    @property
    def arena_bytes(self) -> int:
        """Bytes of the one arena that serves every bucket."""
        return max((b.arena_bytes for b in self.buckets), default=0)

    @property
    def resident(self) -> int:
        """Multiprocessors that a GPU must have: programs that wait for each other in the largest such launch."""
        launches = (launch for bucket in self.buckets for launch in bucket.launches)
        return max((prod(launch.grid) for launch in launches if launch.resident), default=0)

    def to_json(self) -> str:
        """Canonical text: equal plans give equal bytes."""
        return json.dumps({"format": FORMAT, **_fields(self)}, default=_encode, separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: str) -> LaunchPlan:
        """Inverse of to_json. Raises ArtifactError when the text is not a launch plan of this format."""
        try:
            raw = json.loads(text)
            if (version := raw.pop("format")) != FORMAT:
                raise ArtifactError(f"expected launch plan format {FORMAT}, found {version}")
            return LaunchPlan(
                raw["arch"],
                {name: Cubin(**k) for name, k in raw["kernels"].items()},
                tuple(_bucket(b) for b in raw["buckets"]),
                {name: _view(v) for name, v in raw["persistent"].items()},
                {name: TensorType(tuple(v["shape"]), v["dtype"]) for name, v in raw["packed"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"launch plan is malformed: {error!r}") from error


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _encode(value: Any) -> Any:
    """Operands as a list headed by their kind, other records as objects."""
    fields = _fields(value)
    return [_TAGS[type(value)], *fields.values()] if type(value) in _TAGS else fields


def _view(raw: dict[str, Any]) -> View:
    return View(**{**raw, "shape": tuple(raw["shape"]), "strides": tuple(raw["strides"])})


def _bucket(raw: dict[str, Any]) -> Bucket:
    fields = {
        "inputs": {name: _view(v) for name, v in raw["inputs"].items()},
        "launches": tuple(_launch(x) for x in raw["launches"]),
        "greedy": tuple(_launch(x) for x in raw["greedy"]),
        "sampling": tuple(_launch(x) for x in raw["sampling"]),
        "logits": _view(raw["logits"]),
        "sampled": _view(raw["sampled"]),
        "reports": _view(raw["reports"]),
        "zeroed": tuple((offset, size) for offset, size in raw["zeroed"]),
    }
    return Bucket(**{**raw, **fields})


def _launch(raw: dict[str, Any]) -> Launch:
    return Launch(**{**raw, "grid": tuple(raw["grid"]), "args": tuple(_operand(a) for a in raw["args"])})


def _operand(raw: list[Any]) -> Operand:
    kind, *values = raw
    return _OPERANDS[kind](*(tuple(v) if isinstance(v, list) else v for v in values))  # type: ignore[no-any-return]
