"""Fine-grained FP8 (DeepSeek-V3): E4M3 codes and one fp32 scale a block of 128×128."""

from __future__ import annotations

from math import gcd

import torch

from llmopt.errors import CheckpointError
from llmopt.frontend.quantized.layer import FLOATS, Layer, quantized
from llmopt.frontend.quantized.options import Options
from llmopt.frontend.quantized.packing import Scales
from llmopt.frontend.shards import Stored
from llmopt.ir.dequantized import Dequantized, Repeated
from llmopt.ir.quant import QuantTensor, Scheme
from llmopt.ir.weights import Weight

METHODS = ("fp8",)


class Reader:
    """Reads, for a weight (N, K): ``.weight`` float8_e4m3fn (N, K), ``.weight_scale_inv`` (⌈N/128⌉, ⌈K/128⌉), which
    multiplies the codes. Scales of activations are not read.
    """

    marks = (".weight_scale_inv",)

    def __init__(self, options: Options) -> None:
        options.one_of("fmt", ("e4m3",), "e4m3")
        block = options.any("weight_block_size", default=[128, 128])
        if not isinstance(block, list) or len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
            raise CheckpointError(f"weight_block_size is {block!r}, two integers are needed", where=options.where)
        self.block = (block[0], block[1])

    def read(self, layer: Layer) -> dict[str, Weight]:
        """The layer's weight by name."""
        codes = layer.get(".weight", (torch.float8_e4m3fn,))
        scales = layer.get(".weight_scale_inv", FLOATS)
        return {layer.weight: in_blocks(layer, codes, scales, self.block)}


def in_blocks(layer: Layer, codes: Stored, scales: Stored, block: tuple[int, int]) -> Dequantized:
    """FP8 codes (N, K) with a scale a block. Blocks that hang over an edge become smaller ones, with equal scales."""
    if len(codes.shape) != 2:
        layer.refuse(codes, f"is {list(codes.shape)}, not a matrix")
    stored = tuple(-(-size // b) for size, b in zip(codes.shape, block))
    if scales.shape != stored:
        layer.refuse(scales, f"is {list(scales.shape)}, its layer asks for {list(stored)}")
    rows, columns = (gcd(size, b) for size, b in zip(codes.shape, block))
    n, k = codes.shape
    table: Weight = Scales(scales, stored)
    if (rows, columns) != block:
        table = Repeated(table, block[0] // rows, block[1] // columns, (n // rows, k // columns))
    scheme = Scheme("fp8_e4m3", 8, rows, columns, True, scales.dtype)
    return quantized(layer, codes, QuantTensor(codes, table, None, None, scheme))
