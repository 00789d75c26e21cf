"""Matrix products: plain linears and batched products."""

from __future__ import annotations

from llmopt.program import OpCall

from .emitter import Emitter, emits
from .graph import MICROSOFT


@emits("aten.linear.default")
def linear(e: Emitter, call: OpCall) -> None:
    """FusedMatMul with transB: packed at load from the checkpoint's (N, K), as fast as a stored transpose."""
    dtype = e.out(call).dtype
    x, w = e.operand(call.args["input"], dtype), e.operand(call.args["weight"], dtype)
    result = e.graph.node("FusedMatMul", x, w, domain=MICROSOFT, transB=1)
    e.set(call, add_bias(e, call, result, dtype))


def add_bias(e: Emitter, call: OpCall, result: str, dtype: str) -> str:
    """``result`` plus the call's bias, if it has one."""
    bias = call.args["bias"]
    return result if bias is None else e.graph.node("Add", result, e.operand(bias, dtype))


@emits("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def matmul(e: Emitter, call: OpCall) -> None:
    """MatMul."""
    dtype = e.out(call).dtype
    a, b = list(call.args.values())[:2]
    e.set(call, e.graph.node("MatMul", e.operand(a, dtype), e.operand(b, dtype)))


@emits("aten.addmm.default", "aten.baddbmm.default")
def addmm(e: Emitter, call: OpCall) -> None:
    """``beta * bias + alpha * a @ b``."""
    dtype = e.out(call).dtype
    bias, a, b = list(call.args.values())[:3]
    product = e.graph.node("MatMul", e.operand(a, dtype), e.operand(b, dtype))
    if call.args["alpha"] != 1:
        product = e.graph.node("Mul", product, e.operand(call.args["alpha"], dtype))
    addend = e.operand(bias, dtype)
    if call.args["beta"] != 1:
        addend = e.graph.node("Mul", addend, e.operand(call.args["beta"], dtype))
    e.set(call, e.graph.node("Add", product, addend))
