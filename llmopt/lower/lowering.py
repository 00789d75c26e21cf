"""Lower a Module to a Program: fx nodes become op calls with complete arguments and symbolic shapes."""

from __future__ import annotations

import operator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.program import Arg, DimExpr, DType, Function, OpCall, Program, Ref, StatePlan, TensorType, WeightType


def lower(module: Module) -> Program:
    """The program of a module whose passes have run; raises PassError on a node it cannot express."""
    functions = {name: FunctionLowering(module, name, gm).run() for name, gm in module.functions.items()}
    only = next(iter(functions))
    return Program(
        functions=functions,
        entry_points={entry: entry if entry in functions else only for entry in ("decode", "extend")},
        weights={
            name: WeightType(TensorType(w.shape, dtype_name(w.dtype)), w.parts())
            for name, w in sorted(module.weights.items())
        },
        states=StatePlan(tuple(module.states)),
        dims=dict(sorted(module.dims.items())),
        max_context=module.config.max_context,
        vocab_size=module.config.vocab_size,
        rope_switch=module.rope_switch,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``float32``."""
    return str(dtype).removeprefix("torch.")


class FunctionLowering:
    """Lowers one fx function; names values ``<op>_<index>`` in program order, so equal graphs give equal text."""

    def __init__(self, module: Module, name: str, graph_module: fx.GraphModule) -> None:
        self.module, self.name, self.graph = module, name, graph_module.graph
        self.values: dict[fx.Node, Arg] = {}
        self.types: dict[str, TensorType] = {}
        self.calls: list[OpCall] = []
        self.inputs: list[str] = []

    def run(self) -> Function:
        outputs: list[str] = []
        for node in self.graph.nodes:
            match node.op:
                case "placeholder":
                    self.inputs.append(node.name)
                    self.values[node] = Ref(self._typed(node.name, node.meta["val"]))
                case "get_attr":
                    self.values[node] = Ref(str(node.target))
                case "call_function":
                    self._call(node)
                case "output":
                    outputs = [self._output(arg) for arg in node.args[0]]
                case _:
                    raise self._error(node, f"node kind {node.op} has no lowering")
        finals = {name: outputs[index] for name, index in self.module.state_outputs.items()}
        return Function(self.name, tuple(self.inputs), tuple(self.calls), tuple(outputs), self.types, finals)

    def _call(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if node.target is operator.getitem:
            source, index = node.args
            self.values[node] = self.values[source][index]  # type: ignore[index]
        elif isinstance(value, torch.SymInt | int):
            self.values[node] = self._scalar(value)
        elif isinstance(node.target, torch._ops.OpOverload):
            self._op(node, value)
        else:
            raise self._error(node, f"{node.target} is not an operator")

    def _op(self, node: fx.Node, value: Any) -> None:
        overload: Any = node.target
        namespace, base = str(overload.name()).split("::")
        base, _, variant = base.partition(".")
        many = isinstance(value, tuple | list)
        stem = f"{base}_{len(self.calls)}"
        names = tuple(f"{stem}_{i}" for i in range(len(value))) if many else (stem,)
        for name, item in zip(names, value if many else (value,)):
            self._typed(name, item)
        refs = tuple(Ref(name) for name in names)
        self.values[node] = refs if many else refs[0]
        op = f"{namespace}.{base}" + (f".{variant or 'default'}" if namespace != "llmopt" else "")
        self.calls.append(OpCall(op, self._arguments(node, overload), names, node.meta.get("scope", "")))

    def _arguments(self, node: fx.Node, overload: Any) -> dict[str, Arg]:
        given = dict(node.kwargs)
        for declared, arg in zip(overload._schema.arguments, node.args):
            given[declared.name] = arg
        return {
            declared.name: self._arg(given.get(declared.name, declared.default_value), node)
            for declared in overload._schema.arguments
        }

    def _arg(self, arg: Any, node: fx.Node) -> Arg:
        match arg:
            case fx.Node():
                return self.values[arg]
            case torch.dtype():
                return DType(dtype_name(arg))
            case None | bool() | float() | str():
                return arg
            case int() | torch.SymInt():
                return self._scalar(arg)
            case list() | tuple():
                return tuple(self._arg(item, node) for item in arg)
            case torch.device() | torch.layout() | torch.memory_format():
                return None
        raise self._error(node, f"argument {arg!r} has no lowering")

    def _scalar(self, value: int | torch.SymInt) -> int | DimExpr:
        dim = self._dim(value)
        return dim if isinstance(dim, int) else DimExpr(dim)

    def _dim(self, value: int | torch.SymInt) -> int | str:
        if not isinstance(value, torch.SymInt):
            return int(value)
        expr = value.node.expr
        if expr.is_number:
            return int(expr)
        symbols = self.module.symbols
        return str(expr.xreplace({s: sympy.Symbol(symbols.get(s.name, s.name)) for s in expr.free_symbols}))

    def _typed(self, name: str, value: torch.Tensor) -> str:
        self.types[name] = TensorType(tuple(self._dim(d) for d in value.shape), dtype_name(value.dtype))
        return name

    def _output(self, node: fx.Node) -> str:
        value = self.values[node]
        if not isinstance(value, Ref):
            raise self._error(node, "a function's outputs must be tensors")
        return value.name

    def _error(self, node: fx.Node, what: str) -> PassError:
        return PassError(what, where=f"function {self.name}, node {node.name} ({node.meta.get('scope', '')})")
