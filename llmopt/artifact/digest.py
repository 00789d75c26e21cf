"""Digests: sha256 of files, and of large files by chunk so that they can be checked on every core (chunks.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

CHUNK_BYTES = 16 << 20


def sha256(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(chunks: Sequence[str]) -> str:
    """One digest for a chunked file: sha256 over its chunks' raw digests, in order."""
    return sha256(b"".join(bytes.fromhex(chunk) for chunk in chunks))


class ChunkHasher:
    """Hashes a stream in chunks of ``chunk_bytes``; ``finish`` gives the hex digests."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self._digests: list[str] = []
        self._current = hashlib.sha256()
        self._filled = 0

    def update(self, data: memoryview) -> None:
        """Take the next bytes of the stream."""
        while len(data):
            part = data[: self.chunk_bytes - self._filled]
            self._current.update(part)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == self.chunk_bytes:
                self._flush()

    def finish(self) -> tuple[str, ...]:
        """Digests of all chunks; the last one may be short."""
        if self._filled:
            self._flush()
        return tuple(self._digests)

    def _flush(self) -> None:
        self._digests.append(self._current.hexdigest())
        self._current, self._filled = hashlib.sha256(), 0
