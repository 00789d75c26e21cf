"""Quantized experts as the contrib QMoE operator, which takes the routing weights as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmopt.program import OpCall, Ref, TensorType

from .emit_moe import OAI, SILU, interleave_rows, interleaved, spread
from .emit_quantized import number
from .emitter import Emitter, emits
from .graph import MICROSOFT
from .pack import MIN_BLOCK, container, kernel_block, pack_codes, pack_zeros
from .pack import spread as spread_groups
from .readers import Array, Derived


@emits("llmopt.moe_experts_q")
def moe_experts_q(e: Emitter, call: OpCall) -> None:
    """QMoE over 4-bit experts; over 8-bit ones only where activations may be rounded, as it always does so there."""
    args, g, kind = call.args, e.graph, str(call.args["activation"])
    refuse(e, call, kind)
    weights = [Expert(e, call, "gate_up", split=kind == "silu"), Expert(e, call, "down", split=False)]
    block = min(w.block for w in weights)
    bits, level = weights[0].bits, e.accuracy_level
    e.rounds_activations |= bool(level)
    codes, scales, zeros = zip(*(w.initializers(block) for w in weights))
    biases = weights[0].bias(), e.optional(args["down_bias"])
    chosen = spread(e, call, g.node("Mul", e.operand(args["weight"], "float32"), g.const(0.0, "float32")), -1e30)
    mixing = spread(e, call, e.operand(args["weight"], "float32"), 0.0)
    projections = [codes[0], scales[0], biases[0], codes[1], scales[1], biases[1], "", "", ""]
    inputs = [e.ref(args["x"]), chosen, *projections, zeros[0], zeros[1], "", mixing]
    shared: dict[str, Any] = {"k": int(e.shape(args["index"])[1]), "activation_type": "swiglu", "swiglu_fusion": 1}
    quantized: dict[str, Any] = {
        "expert_weight_bits": bits,
        "block_size": block,
        "accuracy_level": level,
        "weights_prepacked": 0,
    }
    attributes = {**shared, **quantized, **(SILU if kind == "silu" else OAI), "normalize_routing_weights": 0}
    e.set(call, g.node("QMoE", *inputs, domain=MICROSOFT, **attributes))


def refuse(e: Emitter, call: OpCall, kind: str) -> None:
    """TargetError for experts that QMoE does not compute exactly."""
    args = call.args
    if args["format"] != "int" or args["block_n"] != 1:
        raise e.error(call, f"format {args['format']} with {args['block_n']} rows a block is not supported")
    if kind not in ("silu", "swiglu_oai") or e.out(call).dtype != "float32":
        raise e.error(call, f"quantized {e.out(call).dtype} experts with activation {kind} have no kernel")
    if container(number(args["bits"])) == 8 and e.accuracy_level == 0:
        hint = "set target_options: {accuracy_level: 4}, use 4 bits, or leave the experts alone"
        raise e.error(call, f"{args['bits']}-bit experts need activations rounded to int8", hint)


class Expert:
    """One quantized projection of all experts; ``split`` interleaves the gate and up rows the program has apart."""

    def __init__(self, e: Emitter, call: OpCall, name: str, split: bool) -> None:
        self.e, self.call, self.name, self.split = e, call, name, split
        self.count, self.rows, self.columns = (int(d) for d in e.shape(call.args[f"{name}_codes"]))
        self.logical_bits, self.group = number(call.args["bits"]), number(call.args[f"{name}_block_k"])
        self.bits = container(self.logical_bits)
        block = kernel_block(self.group, self.columns)
        if block is None or self.columns % block:
            hint = f"use a group size that is a multiple of {MIN_BLOCK}"
            raise e.error(call, f"groups of {self.group} columns have no QMoE block", hint)
        self.block = block

    def initializers(self, block: int) -> tuple[str, str, str]:
        """Names of codes, scales and zeros ("" for the default) in kernel blocks of ``block``."""
        blocks = self.columns // block
        codes = self._derive(
            "codes", "uint8", (self.columns * self.bits // 8,), lambda c: pack_codes(c, self.bits, block)
        )
        scales = self._derive("scales", "float32", (blocks,), lambda s: self._spread(s, block).astype(np.float32))
        packed = (-(-blocks * self.bits // 8),)
        if self.call.args[f"{self.name}_zeros"] is not None:
            transform = lambda z: pack_zeros(self._spread(z, block), self.bits)  # noqa: E731
            return codes, scales, self._derive("zeros", "uint8", packed, transform)
        if self.logical_bits == self.bits:
            return codes, scales, ""
        default = 1 << (self.logical_bits - 1)
        transform = lambda s: pack_zeros(np.full((len(s), blocks), default, np.uint8), self.bits)  # noqa: E731
        return codes, scales, self._derive("scales", "uint8", packed, transform, "zeros")

    def _spread(self, groups: Array, block: int) -> Array:
        return spread_groups(groups, self.group, block, self.columns)

    def bias(self) -> str:
        """The projection's bias, its rows in the weight's order."""
        bias = self.call.args[f"{self.name}_bias"]
        return "" if bias is None else interleaved(self.e, bias) if self.split else self.e.ref(bias)

    def _derive(
        self, part: str, dtype: str, tail: tuple[int, ...], transform: Callable[[Array], Array], suffix: str = ""
    ) -> str:
        """A weight (E, rows, …) made from one of the program's by a transform of its rows."""
        source = self.call.args[f"{self.name}_{part}"]
        assert isinstance(source, Ref)

        def chunk(values: Array) -> Array:
            ordered = interleave_rows(values) if self.split else values
            flat = transform(ordered.reshape(-1, ordered.shape[-1]))
            return flat.reshape(len(values), self.rows, *tail)

        type_ = TensorType((self.count, self.rows, *tail), dtype)
        name = f"{source.name}.qmoe{'_' + suffix if suffix else ''}"
        return self.e.graph.weight(name, Derived(self.e.readers[source.name], type_, chunk))
