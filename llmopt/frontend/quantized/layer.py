"""The stored tensors of one quantized layer, with typed errors for what is missing or of a wrong shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from llmopt.errors import CheckpointError
from llmopt.frontend.shards import Stored
from llmopt.ir.dequantized import Dequantized
from llmopt.ir.quant import QuantTensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """Tensors whose names start with ``stem``; ``taken`` are the names that were read."""

    stem: str
    stored: Mapping[str, Stored]
    where: str
    taken: set[str] = field(default_factory=set)

    @property
    def weight(self) -> str:
        """Name of the weight the layer's tensors stand for."""
        return f"{self.stem}.weight"

    def get(self, leaf: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> Stored:
        """The tensor ``<stem><leaf>``; raises CheckpointError when it is missing or of another dtype or shape."""
        found = self.find(leaf, dtypes, shape)
        if found is None:
            raise CheckpointError(
                f"tensor {self.stem}{leaf} is missing", where=self.where, hint="the quantized layer needs it"
            )
        return found

    def find(self, leaf: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> Stored | None:
        """As ``get``, None when the layer has no such tensor."""
        name = self.stem + leaf
        if name not in self.stored:
            return None
        self.taken.add(name)
        found = self.stored[name]
        if found.dtype not in dtypes:
            known = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            self.refuse(found, f"is {str(found.dtype).removeprefix('torch.')}, the format stores {known}")
        if shape is not None and found.shape != shape:
            self.refuse(found, f"is {list(found.shape)}, its layer asks for {list(shape)}")
        return found

    def refuse(self, tensor: Stored, what: str) -> NoReturn:
        """Raise CheckpointError about a tensor."""
        raise CheckpointError(
            f"tensor {tensor.name} {what}", where=str(tensor.file), hint="the checkpoint and its config disagree"
        )


def quantized(layer: Layer, main: Stored, tensor: QuantTensor) -> Dequantized:
    """The layer's weight over a QuantTensor. Raises CheckpointError when its groups do not fit its shape."""
    try:
        expected = tensor.scheme.scale_shape(tensor.shape)
    except ValueError as error:
        layer.refuse(main, str(error))
    if tensor.scales.shape != expected:
        layer.refuse(main, f"needs scales {list(expected)}, not {list(tensor.scales.shape)}")
    return Dequantized(layer.weight, tensor)
