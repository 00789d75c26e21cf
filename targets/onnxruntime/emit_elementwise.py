"""Elementwise ops: arithmetic with torch's type promotion, comparisons, activations, casts."""

from __future__ import annotations

from llmopt.program import Arg, OpCall, Ref

from .emitter import Emitter, emits
from .graph import MICROSOFT, NATIVE

UNARY = {
    "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor", "log": "Log",
    "neg": "Neg", "reciprocal": "Reciprocal", "relu": "Relu", "round": "Round", "sigmoid": "Sigmoid", "sign": "Sign",
    "sin": "Sin", "sqrt": "Sqrt", "tanh": "Tanh", "tan": "Tan", "isnan": "IsNaN",
}  # fmt: skip
ARITHMETIC = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max", "minimum": "Min"}
COMPARISON = {
    "eq": "Equal", "ne": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip
LOGICAL = {"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}
BITWISE = {
    "bitwise_and": ("And", "BitwiseAnd"),
    "bitwise_or": ("Or", "BitwiseOr"),
    "bitwise_xor": ("Xor", "BitwiseXor"),
}
ORDER = ("bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64")


def stem(call: OpCall) -> str:
    """``aten.add.Tensor`` → ``add``."""
    return call.op.split(".")[1]


def promoted(e: Emitter, *args: Arg) -> str:
    """dtype torch computes a comparison in: tensors with dimensions decide, a scalar only raises the category."""
    tensors = [a for a in args if isinstance(a, Ref)]
    ranked = [a for a in tensors if e.shape(a)] or tensors
    dtype = max((e.type(a).dtype for a in ranked), key=ORDER.index)
    if any(isinstance(a, float) for a in args) and not dtype.startswith(("float", "bfloat")):
        return "float32"
    return "int64" if dtype == "bool" and any(isinstance(a, int) and not isinstance(a, bool) for a in args) else dtype


@emits(*(f"aten.{name}.default" for name in UNARY))
def unary(e: Emitter, call: OpCall) -> None:
    """One ONNX node; integers are computed in the output's float type where torch promotes."""
    source = next(iter(call.args.values()))
    dtype = e.out(call).dtype if e.out(call).dtype != "bool" else e.type(source).dtype
    e.set(call, e.graph.node(UNARY[stem(call)], e.operand(source, dtype)))


@emits("aten.rsqrt.default")
def rsqrt(e: Emitter, call: OpCall) -> None:
    """1 / sqrt(x)."""
    root = e.graph.node("Sqrt", e.operand(call.args["self"], e.out(call).dtype))
    e.set(call, e.graph.node("Reciprocal", root))


@emits("aten.logical_not.default", "aten.bitwise_not.default")
def invert(e: Emitter, call: OpCall) -> None:
    """Not for booleans, BitwiseNot for integers."""
    source = call.args["self"]
    if stem(call) == "logical_not" or e.type(source).dtype == "bool":
        e.set(call, e.graph.node("Not", e.operand(source, "bool")))
    else:
        e.set(call, e.graph.node("BitwiseNot", e.ref(source)))


@emits(
    *(f"aten.{n}.{v}" for n in ARITHMETIC for v in ("Tensor", "Scalar", "Tensor_Tensor", "Tensor_Scalar", "default")),
    "aten.pow.Scalar", "aten.rsub.Scalar", "aten.rsub.Tensor", "aten.div.Tensor_mode", "aten.div.Scalar_mode",
)  # fmt: skip
def arithmetic(e: Emitter, call: OpCall) -> None:
    """Both operands in the result's dtype; ``alpha`` scales the second."""
    names = list(call.args)
    first, second = call.args[names[0]], call.args[names[1]]
    dtype = e.out(call).dtype
    a, b = e.operand(first, dtype), e.operand(second, dtype)
    alpha = call.args.get("alpha", 1)
    if alpha != 1:
        b = e.graph.node("Mul", b, e.graph.const(alpha, dtype))
    op = stem(call)
    if op == "rsub":
        op, a, b = "sub", b, a
    if op == "pow" and second == 2 and isinstance(first, Ref):
        e.set(call, e.graph.node("Mul", a, a))
        return
    mode = call.args.get("rounding_mode")
    if mode == "floor" and dtype.startswith("int"):
        a = e.graph.node("Sub", a, e.graph.node("Mod", a, b))
    result = e.graph.node(ARITHMETIC[op], a, b)
    if mode is not None and not dtype.startswith("int"):
        result = e.graph.node("Floor", result) if mode == "floor" else truncate(e, result)
    e.set(call, result)


def truncate(e: Emitter, name: str) -> str:
    """Round towards zero."""
    return e.graph.node("Mul", e.graph.node("Sign", name), e.graph.node("Floor", e.graph.node("Abs", name)))


@emits("aten.floor_divide.default", "aten.remainder.Tensor", "aten.remainder.Scalar")
def division(e: Emitter, call: OpCall) -> None:
    """Floor division and its remainder, which takes the divisor's sign."""
    dtype = e.out(call).dtype
    a, b = (e.operand(arg, dtype) for arg in list(call.args.values())[:2])
    if dtype.startswith("int"):
        rest = e.graph.node("Mod", a, b)
        e.set(call, rest if stem(call) == "remainder" else e.graph.node("Div", e.graph.node("Sub", a, rest), b))
        return
    quotient = e.graph.node("Floor", e.graph.node("Div", a, b))
    whole = e.graph.node("Mul", quotient, b)
    e.set(call, quotient if stem(call) == "floor_divide" else e.graph.node("Sub", a, whole))


@emits(*(f"aten.{name}.{variant}" for name in COMPARISON for variant in ("Tensor", "Scalar")))
def compare(e: Emitter, call: OpCall) -> None:
    """Compared in the promoted dtype; the result is bool."""
    first, second = list(call.args.values())[:2]
    dtype = promoted(e, first, second)
    result = e.graph.node(COMPARISON[stem(call)], e.operand(first, dtype), e.operand(second, dtype))
    e.set(call, e.graph.node("Not", result) if stem(call) == "ne" else result)


@emits(*(f"aten.{n}.default" for n in LOGICAL), *(f"aten.{n}.{v}" for n in BITWISE for v in ("Tensor", "Scalar")))
def logical(e: Emitter, call: OpCall) -> None:
    """Logical ops on booleans, bitwise ones on integers."""
    op, dtype = stem(call), e.out(call).dtype
    a, b = (e.operand(arg, dtype) for arg in list(call.args.values())[:2])
    e.set(call, e.graph.node(LOGICAL[op] if op in LOGICAL else BITWISE[op][dtype != "bool"], a, b))


@emits("aten.clamp.default", "aten.clamp.Tensor", "aten.clamp_min.default", "aten.clamp_max.default")
def clamp(e: Emitter, call: OpCall) -> None:
    """Max with the lower bound, then Min with the upper one."""
    dtype = e.out(call).dtype
    result = e.operand(call.args["self"], dtype)
    for op, bound in (("Max", call.args.get("min")), ("Min", call.args.get("max"))):
        if bound is not None:
            result = e.graph.node(op, result, e.operand(bound, dtype))
    e.set(call, result)


@emits("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def where(e: Emitter, call: OpCall) -> None:
    """Select by a bool mask."""
    dtype = e.out(call).dtype
    mask, a, b = call.args["condition"], call.args["self"], call.args["other"]
    e.set(call, e.graph.node("Where", e.ref(mask), e.operand(a, dtype), e.operand(b, dtype)))


@emits("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(e: Emitter, call: OpCall) -> None:
    """``value`` where the mask holds."""
    dtype = e.out(call).dtype
    value, source = e.operand(call.args["value"], dtype), e.operand(call.args["self"], dtype)
    e.set(call, e.graph.node("Where", e.ref(call.args["mask"]), value, source))


def activate(e: Emitter, name: str, kind: str) -> str:
    """An activation by its name in the dialect: silu, gelu (erf), gelu_tanh, relu."""
    if kind == "silu":  # x * sigmoid(x) in one node
        return e.graph.node("QuickGelu", name, domain=MICROSOFT, alpha=1.0)
    if kind in ("gelu", "gelu_tanh"):
        return e.graph.node("Gelu", name, approximate="tanh" if kind == "gelu_tanh" else "none")
    return e.graph.node("Relu", name)


@emits("aten.silu.default", "aten.gelu.default")
def activation(e: Emitter, call: OpCall) -> None:
    """silu, gelu."""
    tanh = call.args.get("approximate") == "tanh"
    e.set(call, activate(e, e.ref(call.args["self"]), stem(call) + ("_tanh" if tanh else "")))


@emits("llmopt.gated_activation")
def gated_activation(e: Emitter, call: OpCall) -> None:
    """``act(first half) * second half`` of the last axis; GatedSilu where it is that."""
    source, kind = call.args["x"], call.args["kind"]
    if e.native and kind == "silu" and e.out(call).dtype == "float32":
        e.set(call, e.graph.node("GatedSilu", e.ref(source), domain=NATIVE))
        return
    width = e.out(call).shape[-1]
    gate, up = e.graph.nodes_out("Split", (e.ref(source), e.graph.const([width, width])), 2, axis=-1)
    e.set(call, e.graph.node("Mul", activate(e, gate, str(kind)), up))


@emits(
    "aten._to_copy.default", "aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.clone.default",
    "aten.contiguous.default", "aten.alias.default", "aten.detach.default", "aten.lift_fresh_copy.default",
    "aten.dropout.default", "aten.type_as.default", "aten.view_as.default", "aten.float.default",
)  # fmt: skip
def convert(e: Emitter, call: OpCall) -> None:
    """A cast, or the value itself."""
    source = next(iter(call.args.values()))
    if call.op == "aten.dropout.default" and call.args.get("train"):
        raise e.error(call, "dropout in training mode")
    e.set(call, e.cast(e.ref(source), e.type(source).dtype, e.out(call).dtype))
