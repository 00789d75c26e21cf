"""The weights file to the device, chunk by chunk, every byte read once: copied and hashed from the same buffer."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from llmopt.artifact.chunks import Chunks
from llmopt.artifact.digest import CHUNK_BYTES
from llmopt.artifact.stores import FileStore
from llmopt.errors import ArtifactError
from llmopt.program import Program
from llmopt.runtime.executors.cuda.lanes import PIECE, Lane, Lanes
from llmopt.runtime.executors.cuda.layout import Region, type_bytes


@dataclass(frozen=True)
class Segment:
    """A tensor's bytes in the file and its place on the device."""

    offset: int
    size: int
    target: int


def segments(program: Program, store: FileStore, region: Region, base: int) -> list[Segment]:
    """Where the program's tensors lie, in file order. Raises ArtifactError for a tensor of another size."""
    found = []
    for name, weight in program.weights.items():
        if (entry := store.entries.get(name)) is None:
            continue
        if entry.nbytes != type_bytes(weight.type):
            what = f"expected {type_bytes(weight.type)} bytes, found {entry.nbytes}"
            raise ArtifactError(what, where=f"tensor {name}")
        found.append(Segment(entry.offset, entry.nbytes, base + region.offsets[name]))
    return sorted(found, key=lambda segment: segment.offset)


class FileReader:
    """Reads chunks of a file into lanes; with ``chunks`` their digests are checked, without them only what segments
    need is read. Threads may read different chunks at once."""

    def __init__(self, path: Path, wanted: Sequence[Segment], chunks: Chunks | None) -> None:
        self.path, self.wanted, self.chunks = path, wanted, chunks
        self.starts = [segment.offset for segment in wanted]
        self.chunk_bytes = chunks.entry.chunk_bytes if chunks else CHUNK_BYTES
        self.size = path.stat().st_size
        self.descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def indices(self) -> range:
        """Every chunk of the file."""
        return range(-(-self.size // self.chunk_bytes))

    def read_chunk(self, index: int, lanes: Lanes) -> None:
        """Copy what a chunk holds; raises ArtifactError when it is not what the manifest names."""
        hasher = hashlib.sha256() if self.chunks else None
        start = index * self.chunk_bytes
        stop = min(start + self.chunk_bytes, self.size)
        with lanes.one() as lane:
            for at in range(start, stop, PIECE):
                size = min(PIECE, stop - at)
                sends = list(self.overlaps(at, size))
                if not sends and hasher is None:
                    continue
                self.fill(lane, at, size)
                for offset, target, count in sends:
                    lane.send(offset, target, count)
                if hasher:
                    hasher.update(lane.view[:size])  # while the copy runs
                lane.wait()
        if self.chunks and hasher:
            self.chunks.check(index, hasher.hexdigest())

    def overlaps(self, at: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the piece, device address, bytes) of what segments want of ``size`` bytes at ``at``."""
        first = max(bisect_right(self.starts, at) - 1, 0)
        for segment in self.wanted[first:]:
            if segment.offset >= at + size:
                return
            start = max(at, segment.offset)
            if (count := min(at + size, segment.offset + segment.size) - start) > 0:
                yield start - at, segment.target + start - segment.offset, count

    def fill(self, lane: Lane, at: int, size: int) -> None:
        """Read ``size`` bytes at ``at`` into the lane's buffer."""
        got = 0
        while got < size:
            if not (count := os.preadv(self.descriptor, [lane.view[got:size]], at + got)):
                raise ArtifactError(f"shrank to {at + got} bytes while it was read", where=str(self.path))
            got += count
