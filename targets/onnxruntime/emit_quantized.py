"""Quantized linears as MatMulNBits over packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.program import Arg, OpCall, Ref, TensorType
from llmopt.target import WeightReader

from .emit_linear import add_bias
from .emitter import Emitter, emits
from .graph import MICROSOFT, NATIVE
from .pack import container, kernel_block, nibbles, pack_codes, pack_zeros, spread
from .readers import Array, Derived

NATIVE_BLOCK = 32
"""QuantizedLinear runs blocks of a multiple of this many columns."""


@emits("llmopt.linear_q")
def linear_q(e: Emitter, call: OpCall) -> None:
    """QuantizedLinear where activations may be rounded, else MatMulNBits.

    8-bit codes at accuracy level 0 become two 4-bit halves along K, which is exact. No 8-bit kernel with fp32
    activations exists: MatMulNBits falls back to 82-112 ms for the 125M shape where the halves take 7.5 ms.
    """
    weight = quantized(e, call)
    x, columns, bits = e.ref(call.args["x"]), weight.columns, weight.bits
    if weight.split:
        if weight.padded != columns:
            pads = [0] * (2 * len(e.shape(call.args["x"])) - 1) + [weight.padded - columns]
            x = e.graph.node("Pad", x, e.graph.const(pads))
        x, columns, bits = e.graph.node("Concat", x, x, axis=-1), 2 * weight.padded, 4
    attributes: dict[str, Any] = {"K": columns, "N": weight.rows, "bits": bits, "block_size": weight.block}
    level = e.accuracy_level or None
    e.rounds_activations |= bool(level)
    dtype = e.type(call.args["x"]).dtype
    names = initializers(e, weight, dtype)
    if e.native and level and dtype == "float32" and weight.block % NATIVE_BLOCK == 0:
        result = e.graph.node("QuantizedLinear", x, *names, domain=NATIVE, **attributes)
    else:
        result = e.graph.node("MatMulNBits", x, *names, domain=MICROSOFT, accuracy_level=level, **attributes)
    e.set(call, add_bias(e, call, result, e.out(call).dtype))


@dataclass(frozen=True)
class Quantized:
    """A quantized weight (rows, columns) and how MatMulNBits is to see it: ``blocks`` of ``block`` columns a row.

    ``group``: columns a scale of the program covers; ``split``: stored as 4-bit halves of 8-bit codes.
    """

    name: str
    rows: int
    columns: int
    logical_bits: int
    group: int
    block: int
    split: bool
    codes: WeightReader
    scales: WeightReader
    zeros: WeightReader | None

    @property
    def bits(self) -> int:
        """Bits of the container."""
        return container(self.logical_bits)

    @property
    def blocks(self) -> int:
        """Kernel blocks a row."""
        return -(-self.columns // self.block)

    @property
    def padded(self) -> int:
        """Columns of whole blocks."""
        return self.blocks * self.block

    def pack(self, codes: Array) -> Array:
        """Packed codes of some rows."""
        if not self.split:
            return pack_codes(codes, self.bits, self.block)
        halves = [pack_codes(half, 4, self.block) for half in nibbles(codes)]
        return np.concatenate(halves, axis=1)

    def spread(self, groups: Array) -> Array:
        """Values by group as values by kernel block."""
        return spread(groups, self.group, self.block, self.columns)

    def spread_scales(self, scales: Array) -> Array:
        """Scales of some rows by kernel block."""
        wide = self.spread(scales)
        return np.concatenate((wide * wide.dtype.type(16), wide), axis=1) if self.split else wide

    @property
    def default_zeros(self) -> bool:
        """Whether MatMulNBits' default, 2^(bits - 1), is meant."""
        return self.zeros is None and not self.split and self.logical_bits == self.bits

    def packed_zeros(self, groups: Array) -> Array:
        """Packed zero points of some rows, from theirs by group, or from their scales where all are the middle."""
        middle = 1 << (self.logical_bits - 1)
        zeros = self.spread(groups if self.zeros is not None else np.full(groups.shape, middle, np.uint8))
        return pack_zeros(
            np.concatenate(nibbles(zeros), axis=1) if self.split else zeros, 4 if self.split else self.bits
        )


def quantized(e: Emitter, call: OpCall) -> Quantized:
    """The call's weight; raises TargetError for what MatMulNBits cannot compute exactly."""
    args = call.args
    codes = args["codes"]
    if not isinstance(codes, Ref) or codes.name not in e.readers:
        raise e.error(call, "codes that are not a weight")
    if args["format"] != "int" or args["block_n"] != 1:
        raise e.error(call, f"format {args['format']} with {args['block_n']} rows a block is not supported")
    if args["g_idx"] is not None:
        hint = "gptq: static_groups; a checkpoint's: dequantize: [PATTERN] in the recipe"
        raise e.error(call, "columns in another order than their groups (g_idx) are not supported", hint)
    rows, columns = (int(d) for d in e.shape(codes))
    bits, group = number(args["bits"]), number(args["block_k"])
    block = kernel_block(group, columns)
    if block is None:
        hint = "use a group size that is a multiple of 16"
        raise e.error(call, f"groups of {group} columns have no MatMulNBits block", hint)
    split = container(bits) == 8 and e.accuracy_level == 0
    readers = [e.readers[ref.name] if isinstance(ref, Ref) else None for ref in (args["scales"], args["zeros"])]
    assert readers[0] is not None
    if readers[1] is not None and readers[1].type.dtype != "uint8":
        raise e.error(call, f"zero points of dtype {readers[1].type.dtype} are not supported", "use uint8")
    name = codes.name.removesuffix(".codes")
    return Quantized(name, rows, columns, bits, group, block, split, e.readers[codes.name], readers[0], readers[1])


def number(arg: Arg) -> int:
    """An integer argument."""
    assert isinstance(arg, int), arg
    return arg


def initializers(e: Emitter, weight: Quantized, dtype: str) -> list[str]:
    """Packed codes, scales in ``dtype`` and zero points (where needed), as external initializers."""
    bits = 4 if weight.split else weight.bits
    blocks = weight.blocks * (2 if weight.split else 1)
    codes = TensorType((weight.rows, blocks, weight.block * bits // 8), "uint8")
    scales = TensorType((weight.rows, blocks), dtype)
    names = [
        e.graph.weight(f"{weight.name}.nbits_codes", Derived(weight.codes, codes, weight.pack)),
        e.graph.weight(
            f"{weight.name}.nbits_scales",
            Derived(weight.scales, scales, lambda rows: weight.spread_scales(rows.astype(np.dtype(dtype)))),
        ),
    ]
    if weight.default_zeros:
        return names
    zeros = TensorType((weight.rows, -(-blocks * bits // 8)), "uint8")
    derived = Derived(weight.zeros or weight.scales, zeros, weight.packed_zeros)
    return [*names, e.graph.weight(f"{weight.name}.nbits_zeros", derived)]
