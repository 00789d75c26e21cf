"""Weight stores: a mapped file, and tensors drawn from a seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.artifact.dtypes import numpy_dtype
from llmopt.artifact.manifest import RandomTensor
from llmopt.artifact.tensorfile import Entry, map_tensor
from llmopt.errors import ArtifactError

POOL = 1_048_573
"""Values drawn a tensor, repeated to its size. Drawing all would take minutes at 8B; being prime and longer
than any row, it never gives two rows of a matrix the same values."""


@dataclass(frozen=True)
class FileStore:
    """Tensors of one safetensors file, mapped read-only on demand."""

    path: Path
    entries: Mapping[str, Entry]

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self.entries)

    def dtype(self, name: str) -> str:
        """A tensor's dtype name."""
        return self._entry(name).type.dtype

    def get(self, name: str) -> npt.NDArray[Any]:
        """The tensor as a read-only map, at 64-byte alignment; bfloat16 and fp8 as ml_dtypes."""
        return map_tensor(self.path, self._entry(name))

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ArtifactError(f"no tensor {name}", where=self.path.name)
        return self.entries[name]


@dataclass(frozen=True)
class RandomStore:
    """Tensors drawn from a seed and their names, over a file that holds the small ones."""

    seed: int
    tensors: Mapping[str, RandomTensor]
    rest: FileStore

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return (*self.tensors, *self.rest.names())

    def dtype(self, name: str) -> str:
        """A tensor's dtype name."""
        return self.tensors[name].dtype if name in self.tensors else self.rest.dtype(name)

    def get(self, name: str) -> npt.NDArray[Any]:
        """The tensor, generated now; the same on every machine."""
        return draw(self.seed, name, self.tensors[name]) if name in self.tensors else self.rest.get(name)


def draw(seed: int, name: str, tensor: RandomTensor) -> npt.NDArray[Any]:
    """The tensor ``name`` of a seed: depends on nothing else, so tensors can be drawn in any order."""
    return np.resize(draw_pool(seed, name, tensor), tensor.shape)


def draw_pool(seed: int, name: str, tensor: RandomTensor) -> npt.NDArray[Any]:
    """The values a tensor repeats, in row-major order: POOL of them, or as many as it has."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    generator = np.random.Philox(key=key)
    kind, a, b = tensor.fill
    size = min(POOL, math.prod(tensor.shape))
    match kind:
        case "normal":
            values = _normal(generator, size) * np.float32(b) + np.float32(a)
        case "uniform":
            values = _uniform(generator, size) * np.float32(b - a) + np.float32(a)
        case "integers":
            values = np.floor(_uniform(generator, size) * np.float32(b - a)) + np.float32(a)
        case _:
            raise ArtifactError(f"unknown fill {kind!r}", where=f"tensor {name}")
    return values.astype(numpy_dtype(tensor.dtype))


def _uniform(generator: np.random.Philox, size: int) -> npt.NDArray[np.float32]:
    """Multiples of 2^-24 in [0, 1), from raw words: numpy keeps those the same from version to version."""
    words = np.asarray(generator.random_raw(-(-size // 2)), np.uint64).view(np.uint32)[:size]
    return (words >> 8).astype(np.float32) * np.float32(2**-24)


def _normal(generator: np.random.Philox, size: int) -> npt.NDArray[np.float32]:
    """Nearly normal: a sum of four uniforms scaled to unit variance, so that no library's log or cos shows."""
    total = sum((_uniform(generator, size) - np.float32(0.5) for _ in range(4)), np.zeros(size, np.float32))
    return total * np.float32(3**0.5)
