"""weights.safetensors: a streaming writer with aligned tensors, and a mapped reader."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from llmopt.artifact.digest import ChunkHasher
from llmopt.artifact.dtypes import from_safetensors, numpy_dtype, to_safetensors
from llmopt.errors import ArtifactError, CheckpointError
from llmopt.program import TensorType
from llmopt.target import WeightReader

ALIGNMENT = 64
"""Bytes: a cache line and the widest vector load, so that mapped tensors can be used in place."""

READ_BYTES = 32 << 20
PADDING = "__padding__"
_EXPONENT = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80)}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``offset`` in bytes from the start of the file."""

    type: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Header bytes of the file, the tensors in file order, and the file's size in bytes."""

    header: bytes
    entries: dict[str, Entry]
    size: int


def nbytes(type: TensorType) -> int:
    """Bytes of a tensor of static shape."""
    return math.prod(int(d) for d in type.shape) * numpy_dtype(type.dtype).itemsize


def plan_layout(types: Mapping[str, TensorType], alignment: int = ALIGNMENT) -> Layout:
    """Layout of a file holding these tensors: sorted by name, each at a multiple of ``alignment`` bytes.

    safetensors allows no holes, so gaps are uint8 tensors named ``__padding__.<n>``. Depends on nothing but
    names, shapes and dtypes: a target may refer to tensors by offset before they are written.
    """
    header: dict[str, Any] = {}
    starts: dict[str, int] = {}
    position = pads = 0
    for name in sorted(types):
        if gap := -position % alignment:
            header[f"{PADDING}.{pads}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [position, position + gap]}
            position, pads = position + gap, pads + 1
        end = position + nbytes(types[name])
        shape = [int(d) for d in types[name].shape]
        dtype = to_safetensors(types[name].dtype)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        starts[name], position = position, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    data = len(text) + 8
    entries = {name: Entry(types[name], data + start, nbytes(types[name])) for name, start in starts.items()}
    return Layout(len(text).to_bytes(8, "little") + text, entries, data + position)


def write_tensors(
    file: BinaryIO,
    readers: Mapping[str, WeightReader],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    sources: Mapping[str, str] | None = None,
    alignment: int = ALIGNMENT,
) -> tuple[Layout, tuple[str, ...]]:
    """Stream the tensors into a file; returns the layout and the digests of its chunks.

    Holds one chunk of one tensor at a time. ``sources`` gives the name to blame when a tensor is not finite.
    Raises CheckpointError on NaN or infinity, ArtifactError when a reader contradicts its type.
    """
    layout = plan_layout({name: reader.type for name, reader in readers.items()}, alignment)
    hasher = ChunkHasher()
    position = 0

    def put(data: memoryview) -> None:
        nonlocal position
        file.write(data)
        hasher.update(data)
        position += len(data)

    put(memoryview(layout.header))
    for name, entry in layout.entries.items():
        put(memoryview(bytes(entry.offset - position)))
        for chunk in readers[name].chunks(READ_BYTES):
            _check_chunk(name, entry.type, chunk, (sources or {}).get(name, name))
            put(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
            progress("writing weights", position, layout.size)
        if position != entry.offset + entry.nbytes:
            raise ArtifactError(f"read {position - entry.offset} bytes of {entry.nbytes}", where=f"tensor {name}")
    return layout, hasher.finish()


def _check_chunk(name: str, type: TensorType, chunk: npt.NDArray[Any], source: str) -> None:
    if chunk.dtype != numpy_dtype(type.dtype):
        raise ArtifactError(f"expected {type.dtype}, found {chunk.dtype}", where=f"tensor {name}")
    if type.dtype in _EXPONENT:
        word, mask = _EXPONENT[type.dtype]
        bits = np.ascontiguousarray(chunk).reshape(-1).view(word)
        if len(bits) and int((bits & word(mask)).max()) == mask:
            raise CheckpointError("weights hold NaN or infinity", where=f"tensor {source}")


def read_layout(path: Path) -> Layout:
    """Layout of a file on disk. Raises ArtifactError when its header is no safetensors header or it is truncated."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, 100 << 20):
                raise ValueError(f"header of {length} bytes")
            raw = json.loads(file.read(length))
        entries = {
            name: Entry(
                TensorType(tuple(item["shape"]), from_safetensors(item["dtype"])),
                8 + length + item["data_offsets"][0],
                item["data_offsets"][1] - item["data_offsets"][0],
            )
            for name, item in raw.items()
            if name != "__metadata__" and not name.startswith(PADDING)
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ArtifactError(f"not a safetensors file: {error}", where=path.name) from error
    for name, entry in entries.items():
        if entry.nbytes != nbytes(entry.type) or entry.offset + entry.nbytes > size:
            raise ArtifactError(f"tensor {name} does not fit the file", where=path.name)
    return Layout(b"", entries, size)


def map_tensor(path: Path, entry: Entry) -> npt.NDArray[Any]:
    """A tensor of a file as a read-only map; nothing is read yet."""
    shape, dtype = tuple(int(d) for d in entry.type.shape), numpy_dtype(entry.type.dtype)
    if not entry.nbytes:
        return np.zeros(shape, dtype)
    raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", offset=entry.offset, shape=(entry.nbytes,)))
    return raw.view(dtype).reshape(shape)
