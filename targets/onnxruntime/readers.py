"""Weights derived from the program's, still read in row chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.program import TensorType, dtype_bytes
from llmopt.target import WeightReader

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Derived:
    """``transform`` applied to each row chunk of ``source``; it maps n rows to n rows of ``type``."""

    source: WeightReader
    type: TensorType
    transform: Callable[[Array], Array]

    def chunks(self, max_bytes: int) -> Iterator[Array]:
        """Rows in order. The source's chunks are limited too: a transform may widen or narrow them."""
        ratio = max(1.0, row_bytes(self.type) / max(1, row_bytes(self.source.type)))
        for chunk in self.source.chunks(max(1, int(max_bytes / ratio))):
            yield np.ascontiguousarray(self.transform(chunk))


def row_bytes(type_: TensorType) -> int:
    """Bytes of one row of axis 0."""
    count = dtype_bytes(type_.dtype)
    for extent in type_.shape[1:]:
        count *= int(extent)
    return count


def materialize(reader: WeightReader) -> Array:
    """The whole of a small weight."""
    chunks = list(reader.chunks(1 << 30))
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
