"""The digests of a weights file, chunk by chunk: checked at once on all cores, or by whoever reads the file."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmopt.artifact.digest import tree_digest
from llmopt.artifact.manifest import WeightsEntry
from llmopt.artifact.tensorfile import read_layout
from llmopt.errors import ArtifactError

PIECE = 1 << 20
"""Bytes read before they are hashed: they are still in the core's cache then, and the buffer is used again."""


@dataclass(frozen=True)
class Chunks:
    """The chunks of a weights file as the manifest names them; ``where`` the file for messages. Thread-safe."""

    path: Path
    entry: WeightsEntry
    where: str

    def check_consistent(self) -> None:
        """Raises ArtifactError when the manifest's digests contradict each other."""
        entry = self.entry
        if len(entry.chunks) != -(-entry.bytes // entry.chunk_bytes) or tree_digest(entry.chunks) != entry.digest:
            raise ArtifactError("the digests of the weights contradict each other", where="manifest.json")

    def check(self, index: int, found: str) -> None:
        """Raises ArtifactError, naming the tensors of chunk ``index``, unless ``found`` is its hex sha256."""
        if found != self.entry.chunks[index]:
            what = f"chunk {index} of {len(self.entry.chunks)} ({self._tensors(index)}) is not what the manifest names"
            raise ArtifactError(f"{what}: expected sha256 {self.entry.chunks[index]}, found {found}", where=self.where)

    def check_all(self, threads: int = 0) -> None:
        """Read and check every chunk with so many threads (0: one a core); raises ArtifactError."""
        for index, found in enumerate(self.digests(threads)):
            self.check(index, found)

    def digests(self, threads: int = 0) -> list[str]:
        """Hex sha256 of each chunk of the file; hashlib and preadv release the GIL, so threads suffice."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
                return list(pool.map(lambda index: self._hash(descriptor, index), range(len(self.entry.chunks))))
        finally:
            os.close(descriptor)

    def _hash(self, descriptor: int, index: int) -> str:
        start = index * self.entry.chunk_bytes
        stop = min(start + self.entry.chunk_bytes, self.entry.bytes)
        hasher, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
        while start < stop and (count := os.preadv(descriptor, [buffer[: stop - start]], start)):
            hasher.update(buffer[:count])
            start += count
        return hasher.hexdigest()

    def _tensors(self, index: int) -> str:
        """Names of the tensors a chunk overlaps."""
        start = index * self.entry.chunk_bytes
        stop = start + self.entry.chunk_bytes
        try:
            entries = read_layout(self.path).entries
        except ArtifactError:
            return "header"
        names = [n for n, e in entries.items() if e.offset < stop and e.offset + e.nbytes > start]
        return ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])]) or "header"
