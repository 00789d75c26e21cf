"""Weights from the page cache, or from a seed, to the device: parallel reads into pinned buffers, async copies."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.artifact.stores import FileStore, RandomStore, draw_pool
from llmopt.errors import ArtifactError, ResourceError
from llmopt.program import Program
from llmopt.runtime.executors.cuda.driver import call
from llmopt.runtime.executors.cuda.layout import Region, type_bytes
from llmopt.target import WeightStore

CHUNK = 16 << 20
"""Bytes of a pinned buffer: large enough to hide the copy's latency, small enough that readers overlap copies."""


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


@dataclass(frozen=True)
class Piece:
    """A run of bytes of the weights file and its place on the device."""

    offset: int
    size: int
    target: int


class _Lane:
    """A reader's own pinned buffer, stream and event."""

    def __init__(self) -> None:
        self.pinned = Pinned(CHUNK)
        self.stream = call("cuStreamCreate", 1)

    def close(self) -> None:
        call("cuStreamSynchronize", self.stream)
        call("cuStreamDestroy", self.stream)
        self.pinned.close()


def load_weights(program: Program, store: WeightStore, region: Region, base: int, context: Any, threads: int) -> None:
    """Fill the weights' allocation at ``base``. Raises ArtifactError for a missing or wrong tensor."""
    count = threads or min(16, os.cpu_count() or 1)
    idle: SimpleQueue[_Lane] = SimpleQueue()
    lanes = [_Lane() for _ in range(count)]
    for lane in lanes:
        idle.put(lane)
    check_types(program, store)
    try:
        with ThreadPoolExecutor(count, initializer=lambda: call("cuCtxSetCurrent", context)) as pool:
            tasks = []
            rest = store
            if isinstance(store, RandomStore):
                rest = store.rest
                names = [name for name in program.weights if name in store.tensors]
                tasks += [pool.submit(_draw, store, name, base + region.offsets[name], idle) for name in names]
            tasks += list(_reads(program, rest, region, base, pool, idle))
            for task in tasks:
                task.result()
    finally:
        for lane in lanes:
            lane.close()


def check_types(program: Program, store: WeightStore) -> None:
    """Every weight is in the store with the program's dtype."""
    names = set(store.names())
    for name, weight in program.weights.items():
        if name not in names:
            raise ArtifactError("the artifact's weights lack it", where=f"tensor {name}")
        if store.dtype(name) != weight.type.dtype:
            what = f"expected {weight.type.dtype}, found {store.dtype(name)}"
            raise ArtifactError(what, where=f"tensor {name}")


def _reads(
    program: Program, store: WeightStore, region: Region, base: int, pool: ThreadPoolExecutor, idle: Any
) -> Iterator[Any]:
    if isinstance(store, FileStore):
        descriptor = os.open(store.path, os.O_RDONLY)
        pieces = list(pieces_of(program, store, region, base))
        tasks = [pool.submit(_read, descriptor, piece, idle) for piece in pieces]
        yield from tasks
        yield pool.submit(os.close, descriptor) if not tasks else pool.submit(_close_after, tasks, descriptor)
        return
    for name in program.weights:
        yield pool.submit(_copy, store, name, base + region.offsets[name], idle)


def _close_after(tasks: list[Any], descriptor: int) -> None:
    for task in tasks:
        task.exception()
    os.close(descriptor)


def pieces_of(program: Program, store: FileStore, region: Region, base: int) -> Iterator[Piece]:
    """The file cut into pieces of at most CHUNK bytes, tensor by tensor."""
    for name, weight in program.weights.items():
        entry = store.entries.get(name)
        if entry is None:
            continue
        if entry.nbytes != type_bytes(weight.type):
            what = f"expected {type_bytes(weight.type)} bytes, found {entry.nbytes}"
            raise ArtifactError(what, where=f"tensor {name}")
        for at in range(0, entry.nbytes, CHUNK):
            size = min(CHUNK, entry.nbytes - at)
            yield Piece(entry.offset + at, size, base + region.offsets[name] + at)


def _read(descriptor: int, piece: Piece, idle: Any) -> None:
    lane: _Lane = idle.get()
    try:
        view = lane.pinned.array[: piece.size].data
        got = 0
        while got < piece.size:
            count = os.preadv(descriptor, [view[got:]], piece.offset + got)
            if count == 0:
                raise ResourceError("the weights file shrank while it was read")
            got += count
        _send(lane, piece.target, piece.size)
    finally:
        idle.put(lane)


def _send(lane: _Lane, target: int, size: int) -> None:
    """Copy the lane's buffer; wait, so that the buffer is free again (other lanes go on meanwhile)."""
    call("cuMemcpyHtoDAsync", target, lane.pinned.address, size, lane.stream)
    call("cuStreamSynchronize", lane.stream)


def _copy(store: WeightStore, name: str, target: int, idle: Any) -> None:
    """A tensor of a store that is no file."""
    data = np.ascontiguousarray(store.get(name)).reshape(-1).view(np.uint8)
    lane: _Lane = idle.get()
    try:
        for at in range(0, len(data), CHUNK):
            part = data[at : at + CHUNK]
            lane.pinned.array[: len(part)] = part
            _send(lane, target + at, len(part))
    finally:
        idle.put(lane)


def _draw(store: RandomStore, name: str, target: int, idle: Any) -> None:
    """A seeded tensor: its pool of values goes up once and is repeated on the device by doubling."""
    tensor = store.tensors[name]
    pool = draw_pool(store.seed, name, tensor)
    data = pool.reshape(-1).view(np.uint8)
    total = int(np.prod(tensor.shape)) * pool.dtype.itemsize
    lane: _Lane = idle.get()
    try:
        for at in range(0, len(data), CHUNK):
            part = data[at : at + CHUNK]
            lane.pinned.array[: len(part)] = part
            _send(lane, target + at, len(part))
        filled = len(data)
        while filled < total:
            size = min(filled, total - filled)
            call("cuMemcpyDtoDAsync", target + filled, target, size, lane.stream)
            filled += size
        call("cuStreamSynchronize", lane.stream)
    finally:
        idle.put(lane)
