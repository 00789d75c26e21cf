"""GPTQ checkpoints (AutoGPTQ, GPTQModel): int32 words along the input features, zero points of version 1 or 2."""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.errors import CheckpointError
from llmopt.frontend.quantized.layer import FLOATS, Layer, quantized
from llmopt.frontend.quantized.options import Options
from llmopt.frontend.quantized.packing import WORD, Decoded, Scales, unpack, words_for
from llmopt.frontend.shards import Stored
from llmopt.ir.quant import QuantTensor, Scheme
from llmopt.ir.weights import Constant, Weight

METHODS = ("gptq",)
BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")


class Reader:
    """Reads, for a weight (N, K): ``.qweight`` int32 (K·bits/32, N), ``.scales`` (K/g, N), ``.qzeros`` int32
    (K/g, N·bits/32), ``.g_idx`` int32 (K,): each column's group.

    Version 1 (``checkpoint_format: gptq``, the default) stores zero points less one, modulo 2^bits; version 2
    (``gptq_v2``) stores them as they are. A g_idx in column order is dropped.
    """

    marks = (".qweight",)

    def __init__(self, options: Options) -> None:
        self.bits = options.bits("bits", known=BITS)
        self.group_size = options.integer("group_size", default=-1)
        self.act_order = options.flag("desc_act", False)
        self.lowest = 1 if options.one_of("checkpoint_format", VERSIONS, "gptq") == "gptq" else 0

    def read(self, layer: Layer) -> dict[str, Weight]:
        """The layer's weight by name."""
        words = layer.get(".qweight", (torch.int32,))
        if len(words.shape) != 2 or words.shape[0] * WORD % self.bits:
            layer.refuse(words, f"is {list(words.shape)}, no matrix of {self.bits}-bit codes")
        n, k = words.shape[1], words.shape[0] * WORD // self.bits
        group = self.group_size if self.group_size > 0 else k
        groups = -(-k // group)
        scales = layer.get(".scales", FLOATS, (groups, n))
        packed = layer.get(".qzeros", (torch.int32,), (groups, words_for(n, self.bits)))
        zeros = self._zeros(packed, n)
        symmetric = bool((zeros == 1 << (self.bits - 1)).all())
        index = self._order(layer, k, group, groups)
        scheme = Scheme("int", self.bits, 1, group, symmetric, scales.dtype, index is not None)
        tensor = QuantTensor(
            Decoded((n, k), torch.uint8, lambda a, b: self._codes(words, k, a, b), layer.weight),
            Scales(scales, (n, groups), flipped=True),
            None if symmetric else Decoded((n, groups), torch.uint8, lambda a, b: self._zeros(packed, n)[a:b]),
            None if index is None else Constant(index),
            scheme,
        )
        return {layer.weight: quantized(layer, words, tensor)}

    def _codes(self, words: Stored, k: int, start: int, stop: int) -> Tensor:
        return unpack(words.tensor()[:, start:stop], self.bits, 0, k).t().contiguous()

    def _zeros(self, packed: Stored, n: int) -> Tensor:
        """Zero points (N, K/g) uint8."""
        zeros = unpack(packed.tensor(), self.bits, 1, n).int() + self.lowest
        return (zeros & ((1 << self.bits) - 1)).to(torch.uint8).t().contiguous()

    def _order(self, layer: Layer, k: int, group: int, groups: int) -> Tensor | None:
        """g_idx (K,) int32, None when groups follow the order of columns."""
        stored = layer.find(".g_idx", (torch.int32, torch.int64), (k,))
        if stored is None:
            if self.act_order:
                raise CheckpointError(
                    f"tensor {layer.stem}.g_idx is missing", where=layer.where, hint="desc_act is true"
                )
            return None
        index = stored.tensor().to(torch.int32)
        if not bool(((index >= 0) & (index < groups)).all()):
            layer.refuse(stored, f"names groups outside 0..{groups - 1}")
        return None if torch.equal(index, torch.arange(k, dtype=torch.int32) // group) else index
