"""AWQ checkpoints (AutoAWQ, layout gemm): int32 words along the output features, eight codes interleaved in each."""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.frontend.quantized.layer import FLOATS, Layer, quantized
from llmopt.frontend.quantized.options import Options
from llmopt.frontend.quantized.packing import Decoded, Scales
from llmopt.frontend.shards import Stored
from llmopt.ir.quant import QuantTensor, Scheme
from llmopt.ir.weights import Weight

METHODS = ("awq",)
BITS = 4
EACH = 8
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word, counted from the lowest, holds each of its eight output features."""


class Reader:
    """Reads, for a weight (N, K): ``.qweight`` int32 (K, N/8), ``.qzeros`` int32 (K/g, N/8), ``.scales`` (K/g, N)."""

    marks = (".qweight",)

    def __init__(self, options: Options) -> None:
        options.bits("bits", "w_bit", known=(BITS,))
        self.group_size = options.integer("group_size", "q_group_size", default=-1)
        self.has_zeros = options.flag("zero_point", True)
        version = str(options.any("version", default="gemm")).lower()
        if version != "gemm":
            options.unsupported("version", version, ("gemm",))

    def read(self, layer: Layer) -> dict[str, Weight]:
        """The layer's weight by name."""
        words = layer.get(".qweight", (torch.int32,))
        if len(words.shape) != 2:
            layer.refuse(words, f"is {list(words.shape)}, not a matrix")
        k, n = words.shape[0], words.shape[1] * EACH
        group = self.group_size if self.group_size > 0 else k
        groups = -(-k // group)
        scales = layer.get(".scales", FLOATS, (groups, n))
        packed = layer.get if self.has_zeros else layer.find
        zeros = packed(".qzeros", (torch.int32,), (groups, words.shape[1]))
        tensor = QuantTensor(
            Decoded((n, k), torch.uint8, lambda a, b: columns(words, a, b), layer.weight),
            Scales(scales, (n, groups), flipped=True),
            None if zeros is None else Decoded((n, groups), torch.uint8, lambda a, b: columns(zeros, a, b)),
            None,
            Scheme("int", BITS, 1, group, zeros is None, scales.dtype),
        )
        return {layer.weight: quantized(layer, words, tensor)}


def columns(packed: Stored, start: int, stop: int) -> Tensor:
    """Output features [start, stop) of words (R, N/8) as uint8 (stop - start, R)."""
    first = start // EACH
    words = packed.tensor()[:, first : -(-stop // EACH)].t()
    rows = torch.empty((len(words) * EACH, words.shape[1]), dtype=torch.uint8)
    for feature, nibble in enumerate(NIBBLES):
        rows[feature::EACH] = (words >> BITS * nibble & 15).to(torch.uint8)
    return rows[start - first * EACH : stop - first * EACH]
