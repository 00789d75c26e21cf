"""Lanes from the host to the device: each a page-locked buffer and a stream of its own, for one thread at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from llmopt.runtime.executors.cuda.driver import call

PIECE = 4 << 20
"""Bytes of a lane's buffer."""


class Pinned:
    """A page-locked host buffer seen as bytes."""

    def __init__(self, size: int) -> None:
        self.address = int(call("cuMemHostAlloc", size, 0))
        raw = (ctypes.c_uint8 * size).from_address(self.address)
        self.array: npt.NDArray[np.uint8] = np.ctypeslib.as_array(raw)

    def close(self) -> None:
        """Free it; views of ``array`` must be gone."""
        if self.address:
            call("cuMemFreeHost", self.address)
            self.address = 0


class Lane:
    """A buffer of PIECE bytes and the stream that empties it."""

    def __init__(self, pinned: Pinned, offset: int) -> None:
        self.address = pinned.address + offset
        self.view = pinned.array[offset : offset + PIECE].data
        self.stream = call("cuStreamCreate", 1)

    def send(self, offset: int, target: int, size: int) -> None:
        """Start the copy of ``size`` bytes of the buffer to the device."""
        call("cuMemcpyHtoDAsync", target, self.address + offset, size, self.stream)

    def wait(self) -> None:
        """Until the buffer may be written again."""
        call("cuStreamSynchronize", self.stream)

    def put(self, data: npt.NDArray[np.uint8], target: int) -> None:
        """Copy bytes to the device and wait."""
        for at in range(0, len(data), PIECE):
            part = data[at : at + PIECE]
            self.view[: len(part)] = part.data
            self.send(0, target + at, len(part))
            self.wait()


class Lanes:
    """As many lanes as threads, over one page-locked buffer."""

    def __init__(self, count: int) -> None:
        self.pinned = Pinned(count * PIECE)
        self.all = [Lane(self.pinned, i * PIECE) for i in range(count)]
        self.idle: SimpleQueue[Lane] = SimpleQueue()
        for lane in self.all:
            self.idle.put(lane)

    @contextmanager
    def one(self) -> Iterator[Lane]:
        """A lane that nobody else uses meanwhile."""
        lane = self.idle.get()
        try:
            yield lane
        finally:
            self.idle.put(lane)

    def close(self) -> None:
        """Free buffers and streams once everything sent has arrived."""
        for lane in self.all:
            lane.wait()
            call("cuStreamDestroy", lane.stream)
        self.all.clear()
        self.pinned.close()
