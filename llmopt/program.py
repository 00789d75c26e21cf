"""Program: the torch-free, JSON-serializable form a module is lowered to (stdlib only).

A program holds functions of op calls in SSA form. Shapes are tuples of integers and *dimension
expressions*: strings over the symbolic dims of the program (``"T"``, ``"2*T"``, ``"T + 1"``).
Weights are values that every function may use by name; their names contain a dot, SSA names never do.
"""

from __future__ import annotations

import ast
import hashlib
import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from llmopt.errors import ArtifactError

FORMAT_VERSION = 1

Shape: TypeAlias = tuple["int | str", ...]

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def eval_dim(expr: int | str, dims: Mapping[str, int]) -> int:
    """Value of a dimension expression; raises ArtifactError on an unknown dim or operator."""

    def walk(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int() as value):
                return value
            case ast.Name(id=name) if name in dims:
                return dims[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return int(_OPERATORS[type(op)](walk(left), walk(right)))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
        raise ArtifactError(f"bad dimension expression {expr!r}", hint=f"known dims: {sorted(dims)}")

    return expr if isinstance(expr, int) else walk(ast.parse(expr, mode="eval").body)


def eval_shape(shape: Shape, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Concrete shape for given values of the symbolic dims."""
    return tuple(eval_dim(d, dims) for d in shape)


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype name (torch spelling without the prefix: ``float32``, ``bfloat16``, ``uint8``)."""

    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Ref:
    """Use of a value by name: an SSA value, a function input or a weight."""

    name: str


@dataclass(frozen=True)
class DimExpr:
    """A scalar argument computed from the symbolic dims."""

    expr: str


@dataclass(frozen=True)
class DType:
    """A dtype argument."""

    name: str


Arg: TypeAlias = "Ref | DimExpr | DType | bool | int | float | str | tuple[Arg, ...] | None"


@dataclass(frozen=True)
class OpCall:
    """One call: ``outputs = op(**args)``. ``args`` is complete (schema defaults filled in), in schema order.

    ``op`` is ``"llmopt.rms_norm"`` or ``"aten.add.Tensor"``. ``scope`` is the module path it came from.
    """

    op: str
    args: dict[str, Arg]
    outputs: tuple[str, ...]
    scope: str = ""

    def refs(self) -> Iterator[str]:
        """Names of every value this call reads, in order."""

        def walk(arg: Arg) -> Iterator[str]:
            if isinstance(arg, Ref):
                yield arg.name
            elif isinstance(arg, tuple):
                for item in arg:
                    yield from walk(item)

        for arg in self.args.values():
            yield from walk(arg)


@dataclass(frozen=True)
class Function:
    """An entry point: typed inputs (step metadata, then states), calls in order, outputs.

    ``types`` holds the type of every input and SSA value. ``state_outputs`` maps an input state to the
    value that is its final version: the two share one buffer.
    """

    name: str
    inputs: tuple[str, ...]
    calls: tuple[OpCall, ...]
    outputs: tuple[str, ...]
    types: dict[str, TensorType]
    state_outputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightPart:
    """A checkpoint tensor inside a fused weight: ``rows`` of axis 0 starting at ``start``."""

    name: str
    start: int
    rows: int


@dataclass(frozen=True)
class WeightType:
    """Type of a weight value and the checkpoint tensors it is made of (for sharding and LoRA)."""

    type: TensorType
    parts: tuple[WeightPart, ...] = ()


@dataclass(frozen=True)
class StateSpec:
    """One state tensor of shape ``(blocks, heads, block_size, head_dim)``; ``input`` names it in the functions.

    ``scales``: the weight (heads,) float32 that its codes, int8 or float8_e4m3fn, are multiplied by; None: it holds
    values. The scales belong to the model, not to a block: copying and swapping blocks needs nothing else.
    """

    input: str
    heads: int
    head_dim: int
    dtype: str
    layer: int
    scales: str | None = None


@dataclass(frozen=True)
class StateGroup:
    """States that share block tables, and what the scheduler may do with them.

    ``kind``: ``paged`` (block_size tokens a block), ``slots`` (one block a sequence, block_size = context),
    ``ring`` (one block a sequence: p lives at ``p if p < sinks else sinks + (p - sinks) % (block_size - sinks)``)
    or ``recurrent`` (fixed size). ``window`` is the attention window of a ring. Inputs ``block_table_<name>``
    (n, W) int32 and ``slot_mapping_<name>`` (T,) int64 carry the step's metadata.
    """

    name: str
    kind: str
    block_size: int
    states: tuple[StateSpec, ...]
    window: int | None = None
    sinks: int = 0
    shareable: bool = False
    truncatable: bool = True
    copyable: bool = True
    swappable: bool = True

    def blocks_for(self, tokens: int) -> int:
        """Blocks a sequence of ``tokens`` tokens occupies."""
        return -(-tokens // self.block_size) if self.kind == "paged" else 1

    def block_bytes(self) -> int:
        """Bytes of one block over all states of the group."""
        return sum(s.heads * self.block_size * s.head_dim * dtype_bytes(s.dtype) for s in self.states)

    def max_chunk(self) -> int | None:
        """Most new tokens of one sequence in a step (None: unlimited): a ring must keep the window before the chunk."""
        if self.kind != "ring" or self.window is None:
            return None
        return self.block_size - self.sinks - self.window + 1


@dataclass(frozen=True)
class StatePlan:
    """Every state of the program, by group."""

    groups: tuple[StateGroup, ...] = ()


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element."""
    sizes = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
    return sizes.get(dtype, 1)


@dataclass(frozen=True)
class Program:
    """The lowered model of one rank. ``dims`` maps each symbolic dim to its (min, max)."""

    functions: dict[str, Function]
    entry_points: dict[str, str]
    weights: dict[str, WeightType]
    states: StatePlan
    dims: dict[str, tuple[int, int]]
    max_context: int
    vocab_size: int
    rope_switch: int | None = None
    rank: int = 0
    world_size: int = 1

    def to_json(self) -> str:
        """Canonical text: the same program always gives the same bytes."""
        return json.dumps({"format": FORMAT_VERSION, **_encode(self)}, indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """sha256 of the canonical text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @staticmethod
    def from_json(text: str) -> Program:
        """Inverse of to_json; raises ArtifactError when the text is not a program of this format."""
        try:
            raw = json.loads(text)
            version = raw.pop("format")
            if version != FORMAT_VERSION:
                raise ArtifactError(f"program format {version}, this llmopt reads {FORMAT_VERSION}")
            return _decode_program(raw)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"program.json is malformed: {error!r}") from error

    def with_functions(self, functions: dict[str, Function]) -> Program:
        """A copy with other functions."""
        return replace(self, functions=functions)


def _encode(value: Any) -> Any:
    match value:
        case Ref(name):
            return {"ref": name}
        case DimExpr(expr):
            return {"dim": expr}
        case DType(name):
            return {"dtype": name}
        case TensorType(shape, dtype):
            return [dtype, *shape]
        case dict():
            return {k: _encode(v) for k, v in value.items()}
        case list() | tuple():
            return [_encode(v) for v in value]
        case float() if value != value or value in (float("inf"), float("-inf")):
            return {"float": str(value)}
    if hasattr(value, "__dataclass_fields__"):
        return {name: _encode(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def _decode_arg(raw: Any) -> Arg:
    match raw:
        case {"ref": name}:
            return Ref(name)
        case {"dim": expr}:
            return DimExpr(expr)
        case {"dtype": name}:
            return DType(name)
        case {"float": text}:
            return float(text)
        case list():
            return tuple(_decode_arg(item) for item in raw)
    return raw  # type: ignore[no-any-return]


def _decode_type(raw: list[Any]) -> TensorType:
    return TensorType(tuple(raw[1:]), raw[0])


def _decode_call(raw: dict[str, Any]) -> OpCall:
    args = {name: _decode_arg(arg) for name, arg in raw["args"].items()}
    return OpCall(raw["op"], args, tuple(raw["outputs"]), raw["scope"])


def _decode_function(raw: dict[str, Any]) -> Function:
    return Function(
        raw["name"],
        tuple(raw["inputs"]),
        tuple(_decode_call(c) for c in raw["calls"]),
        tuple(raw["outputs"]),
        {name: _decode_type(t) for name, t in raw["types"].items()},
        dict(raw["state_outputs"]),
    )


def _decode_group(raw: dict[str, Any]) -> StateGroup:
    return StateGroup(**{**raw, "states": tuple(StateSpec(**s) for s in raw["states"])})


def _decode_program(raw: dict[str, Any]) -> Program:
    weights = {
        name: WeightType(_decode_type(w["type"]), tuple(WeightPart(**p) for p in w["parts"]))
        for name, w in raw["weights"].items()
    }
    return Program(
        **{
            **raw,
            "functions": {name: _decode_function(f) for name, f in raw["functions"].items()},
            "weights": weights,
            "states": StatePlan(tuple(_decode_group(g) for g in raw["states"]["groups"])),
            "dims": {name: (lo, hi) for name, (lo, hi) in raw["dims"].items()},
        }
    )
