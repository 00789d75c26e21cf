"""Safetensors shards: headers, and tensors read row by row (never mapped)."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.errors import CheckpointError
from llmopt.ir.weights import Weight
from llmopt.program import WeightPart

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Stored(Weight):
    """A tensor of a shard; ``offset`` is its first byte in the file. Reads are checked for NaN and infinity."""

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...] = field()
    dtype: torch.dtype = field()

    def read(self, start: int, stop: int) -> Tensor:
        row_bytes = self.nbytes // max(1, self.rows)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        buffer = read_range(self.file, self.offset + start * row_bytes, (stop - start) * row_bytes, self.name)
        if not buffer:
            return torch.empty(shape, dtype=self.dtype)
        value = torch.frombuffer(buffer, dtype=self.dtype).reshape(shape)
        if self.dtype.is_floating_point and not bool(isfinite(value)):
            raise CheckpointError(
                f"tensor {self.name} holds NaN or infinity in rows {start}..{stop - 1}",
                where=str(self.file),
                hint="the checkpoint is damaged or was saved from a diverged run",
            )
        return value

    def parts(self) -> tuple[WeightPart, ...]:
        return (WeightPart(self.name, 0, self.rows),)


def isfinite(value: Tensor) -> Tensor:
    """Whether every element is finite, without a temporary of the tensor's size (NaN and inf survive aminmax)."""
    if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        value = value.to(torch.bfloat16)
    low, high = torch.aminmax(value)
    return low.isfinite() & high.isfinite()


def read_range(file: Path, offset: int, size: int, name: str) -> bytearray:
    """``size`` bytes from ``offset``; raises CheckpointError when the file ends before."""
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    try:
        handle = os.open(file, os.O_RDONLY)
        try:
            while done < size:
                count = os.preadv(handle, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"cannot read tensor {name}: {error.strerror}", where=str(file)) from error
    if done < size:
        raise CheckpointError(f"truncated: tensor {name} ends beyond the file", where=str(file))
    return buffer


def read_shard(file: Path) -> dict[str, Stored]:
    """Tensors of a shard by name; raises CheckpointError when its header is damaged or its data cut short."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise CheckpointError("shard is missing", where=str(file), hint="download the checkpoint again") from error
    if size < 8:
        raise CheckpointError(f"truncated: {size} bytes, no safetensors header", where=str(file))
    (length,) = struct.unpack("<Q", read_range(file, 0, 8, "header"))
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"truncated or no safetensors file: a header of {length} bytes in {size}", where=str(file)
        )
    try:
        header = json.loads(bytes(read_range(file, 8, length, "header")))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: stored(name, entry, file, 8 + length, size) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"damaged safetensors header: {error!r}", where=str(file)) from error


def stored(name: str, entry: dict[str, Any], file: Path, base: int, size: int) -> Stored:
    """One header entry, checked against the file's size and its own shape."""
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"tensor {name} has unknown dtype {entry['dtype']!r}", where=str(file))
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(int(n) for n in entry["shape"]), DTYPES[entry["dtype"]]
    need = torch.Size(shape).numel() * dtype.itemsize
    if begin < 0 or end - begin != need or any(n < 0 for n in shape):
        raise CheckpointError(f"tensor {name} claims {end - begin} bytes, its shape needs {need}", where=str(file))
    if base + end > size:
        raise CheckpointError(
            f"truncated: tensor {name} ends at byte {base + end} of {size}",
            where=str(file),
            hint="download the shard again",
        )
    return Stored(name, file, base + begin, shape, dtype)
