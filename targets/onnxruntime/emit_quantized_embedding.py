"""Quantized embedding tables as the contrib operator GatherBlockQuantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmopt.program import OpCall, Ref, TensorType

from .emit_quantized import number
from .emitter import Emitter, emits
from .graph import MICROSOFT
from .pack import MIN_BLOCK, container, kernel_block, pack_codes, pack_zeros, spread
from .readers import Array, Derived


@emits("llmopt.embedding_q")
def embedding_q(e: Emitter, call: OpCall) -> None:
    """GatherBlockQuantized over 4 or 8 bit codes; it multiplies exactly as the reference does."""
    args, dtype = call.args, e.out(call).dtype
    if args["format"] != "int" or args["block_n"] != 1:
        raise e.error(call, f"format {args['format']} with {args['block_n']} rows a block is not supported")
    rows, columns = (int(d) for d in e.shape(args["codes"]))
    logical, group = number(args["bits"]), number(args["block_k"])
    bits, block = container(logical), kernel_block(group, columns)
    if block is None or columns % block:
        hint = f"use a group size that is a multiple of {MIN_BLOCK}"
        raise e.error(call, f"groups of {group} columns have no GatherBlockQuantized block", hint)
    blocks = columns // block

    def wide(values: Array) -> Array:
        return spread(values, group, block, columns)

    def part(kind: str, name: str, type_: TensorType, transform: Callable[[Array], Array]) -> str:
        ref = args[kind]
        assert isinstance(ref, Ref)
        return e.graph.weight(f"{ref.name}.{name}", Derived(e.readers[ref.name], type_, transform))

    packed = TensorType((rows, columns * bits // 8), "uint8")
    codes = part("codes", "rows", packed, lambda c: pack_codes(c, bits, block).reshape(len(c), -1))
    scales = part("scales", "rows", TensorType((rows, blocks), dtype), lambda s: wide(s).astype(np.dtype(dtype)))
    inputs = [codes, e.ref(args["indices"]), scales]
    points = TensorType((rows, -(-blocks * bits // 8)), "uint8")
    if args["zeros"] is not None:
        inputs.append(part("zeros", "rows", points, lambda z: pack_zeros(wide(z), bits)))
    elif logical != bits:
        middle = 1 << (logical - 1)
        filled = lambda s: pack_zeros(np.full((len(s), blocks), middle, np.uint8), bits)  # noqa: E731
        inputs.append(part("scales", "row_zeros", points, filled))
    attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
    e.set(call, e.graph.node("GatherBlockQuantized", *inputs, domain=MICROSOFT, **attributes))
