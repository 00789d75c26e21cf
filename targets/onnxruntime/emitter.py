"""Emitter: walks a function's calls and dispatches each to the rule that emits it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmopt.errors import TargetError
from llmopt.program import Arg, DimExpr, DType, Function, OpCall, Program, Ref, TensorType
from llmopt.target import WeightReader

from .graph import GraphBuilder, onnx_type

Rule = Callable[["Emitter", OpCall], None]
RULES: dict[str, Rule] = {}


def emits(*ops: str) -> Callable[[Rule], Rule]:
    """Register the rule of one or more op names."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


class Emitter:
    """State of one emission. ``values`` maps program values to ONNX names, ``producer`` to the call that made them.

    ``tables`` describes the rotary tables the executor is to bind, ``rounds_activations`` says that a quantized
    linear may quantize its input. ``native`` allows the operators of native/, ``contrib_attention``
    GroupQueryAttention. ``base`` maps a reshaped ONNX value to what it reshapes: a reshape of a reshape needs the
    first one no more. ``shapes``: ONNX values whose shape is not that of the program's value; a reshape to it is none.
    """

    def __init__(
        self,
        program: Program,
        function: Function,
        weights: Mapping[str, WeightReader],
        accuracy_level: int,
        native: bool = False,
        contrib_attention: bool = True,
    ) -> None:
        self.program, self.function, self.readers = program, function, weights
        self.accuracy_level, self.native, self.contrib_attention = accuracy_level, native, contrib_attention
        self.graph = GraphBuilder()
        self.values: dict[str, str] = {}
        self.producer: dict[str, OpCall] = {}
        self.base: dict[str, str] = {}
        self.shapes: dict[str, tuple[int | str, ...]] = {}
        self.tables: dict[str, dict[str, Any]] = {}
        self.rounds_activations = False

    def run(self) -> None:
        """Emit every call; raises TargetError naming the one that has no rule."""
        for call in self.function.calls:
            rule = RULES.get(call.op)
            if rule is None:
                raise self.error(call, f"op {call.op} has no ONNX form")
            rule(self, call)
            self.producer.update(dict.fromkeys(call.outputs, call))

    def error(self, call: OpCall, what: str, hint: str | None = None) -> TargetError:
        """A TargetError that names the call."""
        where = f"call {call.op} -> {', '.join(call.outputs)}" + (f" in {call.scope}" if call.scope else "")
        return TargetError(what, where=where, hint=hint)

    def type(self, arg: Arg) -> TensorType:
        """Type of a value or weight."""
        assert isinstance(arg, Ref), arg
        found = self.function.types.get(arg.name)
        return found if found is not None else self.program.weights[arg.name].type

    def shape(self, arg: Arg) -> tuple[int | str, ...]:
        """Symbolic shape of a value or weight."""
        return self.type(arg).shape

    def ref(self, arg: Arg) -> str:
        """ONNX name of a value or weight."""
        assert isinstance(arg, Ref), arg
        if arg.name in self.values:
            return self.values[arg.name]
        if arg.name in self.readers:
            return self.graph.weight(arg.name, self.readers[arg.name])
        raise TargetError(f"value {arg.name} is read before anything made it")

    def optional(self, arg: Arg) -> str:
        """ONNX name of a value, or "" for None."""
        return "" if arg is None else self.ref(arg)

    def set(self, call: OpCall, *names: str) -> None:
        """Bind a call's outputs to ONNX values."""
        self.values.update(zip(call.outputs, names))

    def out(self, call: OpCall, index: int = 0) -> TensorType:
        """Type of a call's output."""
        return self.function.types[call.outputs[index]]

    def operand(self, arg: Arg, dtype: str) -> str:
        """A tensor operand in ``dtype``: values are cast when they differ, scalars become constants."""
        if isinstance(arg, Ref):
            return self.cast(self.ref(arg), self.type(arg).dtype, dtype)
        if isinstance(arg, DimExpr):
            return self.cast(self.scalar(arg), "int64", dtype)
        assert isinstance(arg, bool | int | float), arg
        return self.graph.const(arg, dtype)

    def cast(self, name: str, source: str, to: str) -> str:
        """``name`` in another dtype."""
        return name if source == to else self.graph.node("Cast", name, to=onnx_type(to))

    def scalar(self, dim: int | str | DimExpr) -> str:
        """Rank-0 int64 value of a dimension expression, computed in the graph."""
        if isinstance(dim, int):
            return self.graph.const(dim)

        def walk(node: ast.expr) -> str:
            match node:
                case ast.Constant(value=int() as value):
                    return self.graph.const(value)
                case ast.Name(id=name):
                    return self._symbol(name)
                case ast.UnaryOp(op=ast.USub(), operand=operand):
                    return self.graph.node("Neg", walk(operand))
                case ast.BinOp(left=left, op=op, right=right) if type(op) in _DIM_OPS:
                    return self.graph.node(_DIM_OPS[type(op)], walk(left), walk(right))
            raise TargetError(f"dimension expression {dim!r} has no ONNX form")

        return walk(ast.parse(dim.expr if isinstance(dim, DimExpr) else dim, mode="eval").body)

    def _symbol(self, name: str) -> str:
        """Rank-0 value of a symbolic dim, read off the first input whose shape has it as an axis."""
        for source in self.function.inputs:
            shape = self.function.types[source].shape
            if name in shape and source in self.values:
                dims = self.graph.node("Shape", self.values[source])
                return self.graph.node("Gather", dims, self.graph.const(shape.index(name)), axis=0)
        raise TargetError(f"symbolic dim {name} belongs to no input of {self.function.name}")

    def dims(self, shape: Sequence[Any], infer: bool = True) -> str:
        """int64 vector of a shape. With ``infer`` a single symbolic extent becomes -1 (for Reshape)."""
        symbolic = [d for d in shape if not isinstance(d, int)]
        if not symbolic:
            return self.graph.const(list(shape))
        if infer and len(symbolic) == 1 and -1 not in shape:
            return self.graph.const([d if isinstance(d, int) else -1 for d in shape])
        one = self.graph.const([1])
        parts = [
            self.graph.const([d]) if isinstance(d, int) else self.graph.node("Reshape", self.scalar(d), one)
            for d in shape
        ]
        return self.graph.node("Concat", *parts, axis=0)

    def reshape(self, name: str, shape: Sequence[Any]) -> str:
        """``name`` reshaped; skips a reshape it follows."""
        source = self.base.get(name, name)
        if self.shapes.get(source) == tuple(shape):
            return source
        result = self.graph.node("Reshape", source, self.dims(shape))
        self.base[result] = source
        return result


_DIM_OPS: dict[type, str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.FloorDiv: "Div", ast.Mod: "Mod"}


def dtype_of(arg: Arg, default: str) -> str:
    """The dtype an argument asks for."""
    return arg.name if isinstance(arg, DType) else default


def axis(dim: Arg, rank: int) -> int:
    """A non-negative axis."""
    assert isinstance(dim, int), dim
    return dim % max(rank, 1)


def axes(dims: Arg, rank: int) -> list[int]:
    """Non-negative axes; None or empty means all."""
    if isinstance(dims, int):
        return [axis(dims, rank)]
    assert dims is None or isinstance(dims, tuple), dims
    return [axis(d, rank) for d in dims] if dims else list(range(rank))
