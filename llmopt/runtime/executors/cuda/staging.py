"""Pinned staging of steps on their way: inputs and masks going up, tokens, reports and logits coming down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver as cu  # type: ignore[import-untyped]

from llmopt.artifact.dtypes import numpy_dtype
from llmopt.launch import View
from llmopt.program import dtype_bytes
from llmopt.runtime.executors.cuda.backend import Result, Tail
from llmopt.runtime.executors.cuda.driver import call
from llmopt.runtime.executors.cuda.lanes import Pinned
from llmopt.runtime.executors.cuda.layout import Region
from llmopt.runtime.executors.cuda.steps import Arrays
from llmopt.runtime.protocol import IntArray


class Flight:
    """One run's buffers; free again once its result has been taken. All but inputs and tables grow as needed."""

    def __init__(self, inputs: int, tables: int) -> None:
        self.inputs, self.tables = Pinned(max(inputs, 1)), Pinned(max(tables, 1))
        self.buffers = {name: Pinned(4096) for name in ("rows", "masks", "tokens", "reports", "logits")}
        self.event = call("cuEventCreate", cu.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self.results: list[npt.NDArray[Any]] = []

    def send(self, packed: Region, target: int, inputs: Arrays, stream: Any) -> None:
        """Copy the packed inputs to the device at ``target``."""
        for name, offset in packed.offsets.items():
            data = np.ascontiguousarray(inputs[name]).reshape(-1).view(np.uint8)
            self.inputs.array[offset : offset + len(data)] = data
        call("cuMemcpyHtoDAsync", target, self.inputs.address, packed.size, stream)

    def send_table(self, offset: int, target: int, table: npt.NDArray[Any], width: int, stream: Any) -> None:
        """Copy the used columns of a block table to rows of ``width`` entries at ``target``."""
        self.tables.array[offset : offset + table.nbytes] = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
        copy = cu.CUDA_MEMCPY2D()
        copy.srcMemoryType = cu.CUmemorytype.CU_MEMORYTYPE_HOST
        copy.srcHost = self.tables.address + offset
        copy.srcPitch = copy.WidthInBytes = table.shape[1] * table.itemsize
        copy.dstMemoryType = cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.dstDevice = target
        copy.dstPitch = width * table.itemsize
        copy.Height = table.shape[0]
        call("cuMemcpy2DAsync", copy, stream)

    def send_rows(self, rows: Sequence[tuple[int, npt.NDArray[Any]]], stream: Any) -> None:
        """Copy arrays to addresses on the device."""
        buffer = self._room("rows", sum(row.nbytes for _, row in rows))
        at = 0
        for target, row in rows:
            buffer.array[at : at + row.nbytes] = np.ascontiguousarray(row).view(np.uint8)
            call("cuMemcpyHtoDAsync", target, buffer.address + at, row.nbytes, stream)
            at += row.nbytes

    def send_masks(self, masks: npt.NDArray[np.uint32], target: int, stream: Any) -> None:
        """Copy masks (n, words) to the device."""
        if masks.nbytes:
            buffer = self._room("masks", masks.nbytes)
            buffer.array[: masks.nbytes] = masks.reshape(-1).view(np.uint8)
            call("cuMemcpyHtoDAsync", target, buffer.address, masks.nbytes, stream)

    def receive(self, views: Mapping[str, tuple[View, int]], tail: Tail, stream: Any) -> None:
        """Copy back what a tail asks for of ``tokens``, ``reports`` and ``logits`` (views with their addresses); mark
        the run's end."""
        self.results.clear()  # views of the buffers, which may be replaced now
        drawn = np.arange(views["tokens"][0].shape[0] if tail.draw != "nothing" else 0)
        rows = {"tokens": drawn, "reports": drawn if tail.reports else drawn[:0], "logits": tail.logits}
        for name, (view, address) in views.items():
            self.results.append(self._fetch(name, view, address, rows[name], stream))
        call("cuEventRecord", self.event, stream)

    def _fetch(self, name: str, view: View, address: int, rows: IntArray, stream: Any) -> npt.NDArray[Any]:
        """Copy rows of a view, neighbours together, packed."""
        pitch = view.strides[0]
        size = pitch * dtype_bytes(view.dtype)
        buffer = self._room(name, len(rows) * size)
        at = 0
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else ():
            source = address + int(run[0]) * size
            call("cuMemcpyDtoHAsync", buffer.address + at, source, len(run) * size, stream)
            at += len(run) * size
        found = buffer.array[:at].view(numpy_dtype(view.dtype)).reshape(len(rows), pitch)
        return found[:, : view.shape[1]] if len(view.shape) > 1 else found[:, 0]

    def _room(self, name: str, size: int) -> Pinned:
        """A buffer of at least ``size`` bytes."""
        if len(self.buffers[name].array) < size:
            self.buffers[name].close()
            self.buffers[name] = Pinned(size)
        return self.buffers[name]

    def take(self) -> Result:
        """Wait, then what came back, as copies."""
        call("cuEventSynchronize", self.event)
        tokens, reports, logits = self.results
        return Result(tokens.astype(np.int64), reports.copy(), logits.astype(np.float32))

    def close(self) -> None:
        """Free the buffers."""
        self.results.clear()
        call("cuEventDestroy", self.event)
        for buffer in (self.inputs, self.tables, *self.buffers.values()):
            buffer.close()
