"""Adapts the IR's lazy weights to the torch-free WeightReader of the target contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from llmopt.ir.weights import Weight
from llmopt.program import Program, TensorType


@dataclass(frozen=True)
class Reader:
    """A weight as numpy chunks; bfloat16 becomes ``ml_dtypes.bfloat16``."""

    weight: Weight
    type: TensorType

    def chunks(self, max_bytes: int) -> Iterator[npt.NDArray[Any]]:
        """The tensor's rows in order, at most ``max_bytes`` at a time (one row at least)."""
        for chunk in self.weight.chunks(max_bytes):
            yield to_numpy(chunk)


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's memory as numpy, without a copy when contiguous."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def to_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    """Inverse of to_numpy; read-only maps are copied."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def readers(program: Program, weights: Mapping[str, Weight]) -> dict[str, Reader]:
    """A reader for each weight of the program."""
    return {name: Reader(weights[name], entry.type) for name, entry in program.weights.items()}
