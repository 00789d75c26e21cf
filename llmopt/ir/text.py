"""The text form of the IR: stable names, symbolic shapes, weights by name; the same module always prints the same."""

from __future__ import annotations

import operator
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from llmopt.ir.module import Module

SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def print_module(module: Module) -> str:
    """Every function of the module."""
    return "\n".join(print_function(module, name) for name in module.functions)


def print_function(module: Module, name: str) -> str:
    """One function: ``%rms_norm_3 : f32[1, T, 64] = llmopt.rms_norm(%add_1, @model.norm.weight, 1e-05, 0.0, False)``.

    Values are numbered by op in program order, not by fx name; ``# scope`` lines say which module nodes come from.
    """
    graph = module.functions[name].graph
    printer = Printer(module, graph)
    inputs = [f"  %{n.name} : {printer.type(n.meta.get('val'))}" for n in graph.nodes if n.op == "placeholder"]
    return "\n".join([f"{name}(", *(f"{line}," for line in inputs), ") {", *printer.body(), "}", ""])


class Printer:
    """Names and prints the nodes of one graph."""

    def __init__(self, module: Module, graph: fx.Graph) -> None:
        self.symbols, self.graph = module.symbols, graph
        self.names: dict[fx.Node, str] = {}
        seen: dict[str, int] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self.names[node] = f"%{node.name}"
            elif node.op == "get_attr":
                self.names[node] = f"@{node.target}"
            elif node.op == "call_function" and node.target is operator.getitem and node.args[0] in self.names:
                self.names[node] = f"{self.names[node.args[0]]}.{node.args[1]}"
            elif node.op == "call_function":
                stem = op_name(node).split(".")[1]
                self.names[node] = f"%{stem}_{seen.setdefault(stem, 0)}"
                seen[stem] += 1

    def body(self) -> list[str]:
        """Lines of the calls and the return."""
        lines, scope = [], None
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target is not operator.getitem:
                if node.meta.get("scope") != scope:
                    scope = node.meta.get("scope")
                    lines.append(f"  # {scope}" if scope else "  #")
                lines.append(f"  {self.call(node)}")
            elif node.op == "output":
                lines.append(f"  return {self.arg(node.args[0])}")
        return lines

    def call(self, node: fx.Node) -> str:
        """One call without indentation."""
        arguments = [self.arg(a) for a in node.args] + [f"{k}={self.arg(v)}" for k, v in node.kwargs.items()]
        return f"{self.names[node]} : {self.type(node.meta.get('val'))} = {op_name(node)}({', '.join(arguments)})"

    def type(self, value: Any) -> str:
        """``f32[1, T, 64]``, ``sym``, or a tuple of types."""
        match value:
            case torch.Tensor():
                return f"{SHORT.get(value.dtype, str(value.dtype))}[{', '.join(self.dim(d) for d in value.shape)}]"
            case tuple() | list():
                return f"({', '.join(self.type(item) for item in value)})"
            case int() | torch.SymInt():
                return self.dim(value)
        return "?"

    def dim(self, value: int | torch.SymInt) -> str:
        """A dim in the module's names."""
        if not isinstance(value, torch.SymInt):
            return str(value)
        expr = value.node.expr
        return str(expr.xreplace({s: sympy.Symbol(self.symbols.get(s.name, s.name)) for s in expr.free_symbols}))

    def arg(self, arg: Any) -> str:
        """One argument."""
        match arg:
            case fx.Node():
                return self.names[arg]
            case torch.SymInt():
                return self.dim(arg)
            case torch.dtype():
                return SHORT.get(arg, str(arg))
            case list() | tuple():
                return f"({', '.join(self.arg(item) for item in arg)})"
        return str(arg)


def op_name(node: fx.Node) -> str:
    """``llmopt.rms_norm``, ``aten.add.Tensor`` (``.default`` left out), ``operator.mul``."""
    if isinstance(node.target, torch._ops.OpOverload):
        schema: Any = node.target._schema
        return ".".join(filter(None, (*schema.name.split("::"), schema.overload_name)))
    return f"operator.{getattr(node.target, '__name__', node.target)}"
