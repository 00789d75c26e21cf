"""Weights from the page cache, or from a seed, to the device: parallel reads into pinned buffers, async copies."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from llmopt.artifact.chunks import Chunks
from llmopt.artifact.stores import FileStore, RandomStore, draw_pool
from llmopt.errors import ArtifactError
from llmopt.program import Program
from llmopt.runtime.executors.cuda.driver import call
from llmopt.runtime.executors.cuda.lanes import Lanes
from llmopt.runtime.executors.cuda.layout import Region
from llmopt.runtime.executors.cuda.reading import FileReader, segments
from llmopt.target import WeightStore


def load_weights(
    program: Program,
    store: WeightStore,
    region: Region,
    base: int,
    context: Any,
    threads: int,
    chunks: Chunks | None = None,
) -> None:
    """Fill the weights' allocation at ``base``; ``chunks``: digests to check on the way.

    Raises ArtifactError for a missing or wrong tensor, or a chunk that is not what the manifest names.
    """  # fmt: skip
    check_types(program, store)
    count = threads or min(16, os.cpu_count() or 1)
    seeded = store if isinstance(store, RandomStore) else None
    file = seeded.rest if seeded else store
    with ExitStack() as stack:
        lanes = Lanes(count)
        stack.callback(lanes.close)
        reader = None
        if isinstance(file, FileStore):
            reader = stack.enter_context(FileReader(file.path, segments(program, file, region, base), chunks))
        pool = stack.enter_context(ThreadPoolExecutor(count, initializer=lambda: call("cuCtxSetCurrent", context)))
        stack.callback(pool.shutdown, cancel_futures=True)
        tasks: list[Future[None]] = []
        if reader:
            tasks += [pool.submit(reader.read_chunk, index, lanes) for index in reader.indices()]
        for name in program.weights:
            if seeded and name in seeded.tensors:
                tasks.append(pool.submit(_draw, seeded, name, base + region.offsets[name], lanes))
            elif not reader:
                tasks.append(pool.submit(_copy, file, name, base + region.offsets[name], lanes))
        for task in tasks:
            task.result()


def check_types(program: Program, store: WeightStore) -> None:
    """Every weight is in the store with the program's dtype."""
    names = set(store.names())
    for name, weight in program.weights.items():
        if name not in names:
            raise ArtifactError("the artifact's weights lack it", where=f"tensor {name}")
        if store.dtype(name) != weight.type.dtype:
            what = f"expected {weight.type.dtype}, found {store.dtype(name)}"
            raise ArtifactError(what, where=f"tensor {name}")


def _copy(store: WeightStore, name: str, target: int, lanes: Lanes) -> None:
    """A tensor of a store that is no file."""
    with lanes.one() as lane:
        lane.put(np.ascontiguousarray(store.get(name)).reshape(-1).view(np.uint8), target)


def _draw(store: RandomStore, name: str, target: int, lanes: Lanes) -> None:
    """A seeded tensor: its pool of values goes up once and is repeated on the device by doubling."""
    tensor = store.tensors[name]
    pool = draw_pool(store.seed, name, tensor)
    total = int(np.prod(tensor.shape)) * pool.dtype.itemsize
    with lanes.one() as lane:
        lane.put(pool.reshape(-1).view(np.uint8), target)
        filled = pool.nbytes
        while filled < total:
            size = min(filled, total - filled)
            call("cuMemcpyDtoDAsync", target + filled, target, size, lane.stream)
            filled += size
        lane.wait()
