"""MXFP4 (gpt-oss): two E2M1 codes a byte and one E8M0 scale for 32 input features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.errors import CheckpointError
from llmopt.frontend.quantized.layer import Layer, quantized
from llmopt.frontend.quantized.options import Options
from llmopt.frontend.quantized.packing import Decoded
from llmopt.frontend.shards import Stored
from llmopt.ir.quant import QuantTensor, Scheme
from llmopt.ir.weights import Transposed, Weight

METHODS = ("mxfp4",)
BLOCK = 32
NOT_A_NUMBER = 255
MANTISSA, SUBNORMAL = 7, 0x40
"""Of bfloat16, whose exponent is E8M0's: bits below it, and 2^-127, the one power it has no exponent for."""


class Reader:
    """Reads, for experts (E, N, K): ``_blocks`` uint8 (E, N, K/32, 16), the even feature in the low nibble, and
    ``_scales`` uint8 (E, N, K/32), exponents of two plus 127. The model has the matrices transposed, (E, K, N).
    """

    marks = ("_blocks",)

    def __init__(self, options: Options) -> None:
        """The format has no options that matter here."""

    def read(self, layer: Layer) -> dict[str, Weight]:
        """The layer's weight by name."""
        blocks = layer.get("_blocks", (torch.uint8,))
        if len(blocks.shape) != 4 or blocks.shape[3] != BLOCK // 2:
            layer.refuse(blocks, f"is {list(blocks.shape)}, not (experts, rows, blocks, {BLOCK // 2})")
        e, n, count, _ = blocks.shape
        exponents = layer.get("_scales", (torch.uint8,), (e, n, count))
        tensor = QuantTensor(
            Decoded((e, n, count * BLOCK), torch.uint8, lambda a, b: nibbles(blocks.read(a, b)), layer.stem),
            Powers(exponents),
            None,
            None,
            Scheme("mxfp4", 4, 1, BLOCK, True, torch.bfloat16),
        )
        return {layer.stem: Transposed(quantized(layer, blocks, tensor))}


@dataclass(frozen=True)
class Powers(Weight):
    """2^(exponent - 127) in bfloat16, which holds every one exactly."""

    source: Stored

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.source.shape)
        object.__setattr__(self, "dtype", torch.bfloat16)

    def read(self, start: int, stop: int) -> Tensor:
        exponents = self.source.read(start, stop)
        if bool((exponents == NOT_A_NUMBER).any()):
            raise CheckpointError(f"tensor {self.source.name} holds scales that are NaN", where=str(self.source.file))
        return powers(exponents)


def powers(exponents: Tensor) -> Tensor:
    """2^(exponent - 127) in bfloat16 of uint8 exponents below 255."""
    bits = torch.where(exponents == 0, SUBNORMAL, exponents.int() << MANTISSA)
    return bits.to(torch.int16).view(torch.bfloat16)


def nibbles(blocks: Tensor) -> Tensor:
    """Codes (..., K) of bytes (..., K/32, 16)."""
    return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-3)
