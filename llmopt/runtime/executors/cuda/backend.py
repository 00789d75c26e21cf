"""What the executor needs of a device: buckets run in two halves, the forward pass and what follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from llmopt.program import StateGroup
from llmopt.runtime.executors.cuda.steps import Arrays
from llmopt.runtime.protocol import FloatArray, IntArray

Draw: TypeAlias = Literal["nothing", "greedy", "full"]


@dataclass(frozen=True)
class Tail:
    """What follows a forward pass: how tokens are drawn, and what comes back to the host.

    ``greedy`` draws largest logits only; ``full`` as the places' records say, with ``masks`` (n, ceil(V/32)) uint32.
    ``reports``: whether log-probabilities come back. ``logits``: rows of logits that do, ascending.
    """

    draw: Draw
    masks: npt.NDArray[np.uint32]
    reports: bool
    logits: IntArray


@dataclass(frozen=True)
class Result:
    """What came back: ``tokens`` (M,) int64, ``reports`` (M, REPORT_WORDS) int32 if asked for (else no rows),
    ``logits`` (rows asked for, V) float32."""

    tokens: IntArray
    reports: npt.NDArray[np.int32]
    logits: FloatArray


class Backend(Protocol):
    """The GPU, or in tests an interpreter; work is done in the order of the calls.

    ``blocks``: blocks allocated by state group.
    """

    blocks: Mapping[str, int]

    def keep(self, place: int, rows: Arrays) -> None:
        """Write the start of a place's row in persistent buffers, before the next forward pass."""
        ...

    def forward(self, bucket: int, inputs: Arrays) -> int:
        """Enqueue a bucket's forward pass with its inputs (block tables unpadded). Returns a handle."""
        ...

    def finish(self, handle: int, tail: Tail) -> None:
        """Enqueue what follows the last forward pass."""
        ...

    def result(self, handle: int) -> Result:
        """Wait for a finished run, once."""
        ...

    def copy_blocks(self, group: StateGroup, source: IntArray, target: IntArray) -> None:
        """Copy blocks of every state of a group."""
        ...

    def read_blocks(self, group: StateGroup, blocks: IntArray) -> list[npt.NDArray[np.uint8]]:
        """Blocks of every state of a group, on the host."""
        ...

    def write_blocks(self, group: StateGroup, blocks: IntArray, data: list[npt.NDArray[np.uint8]]) -> None:
        """Inverse of read_blocks."""
        ...

    def close(self) -> None:
        """Free the device's memory."""
        ...
