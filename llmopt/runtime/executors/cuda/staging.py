"""Pinned staging of steps on their way: inputs going up, tokens and logits coming down."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver as cu  # type: ignore[import-untyped]

from llmopt.artifact.dtypes import numpy_dtype
from llmopt.launch import View
from llmopt.program import dtype_bytes
from llmopt.runtime.executors.cuda.driver import call
from llmopt.runtime.executors.cuda.lanes import Pinned
from llmopt.runtime.executors.cuda.layout import Region
from llmopt.runtime.executors.cuda.steps import Arrays
from llmopt.runtime.protocol import FloatArray, IntArray


class Flight:
    """One run's buffers; free again once its result has been taken. Logits buffers grow as they are asked for."""

    def __init__(self, inputs: int, tables: int) -> None:
        self.inputs, self.tables = Pinned(max(inputs, 1)), Pinned(max(tables, 1))
        self.tokens, self.logits = Pinned(4096), Pinned(4096)
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

    def receive(self, tokens: tuple[View, int], logits: tuple[View, int], rows: int, stream: Any) -> None:
        """Copy drawn tokens and ``rows`` rows of logits back (views with their addresses); mark the run's end."""
        self.results.clear()  # views of the buffers, which may be replaced now
        self.results.append(self._fetch("tokens", *tokens, tokens[0].shape[0], stream))
        self.results.append(self._fetch("logits", *logits, rows, stream))
        call("cuEventRecord", self.event, stream)

    def _fetch(self, name: str, view: View, address: int, rows: int, stream: Any) -> npt.NDArray[Any]:
        pitch, size = view.strides[0], rows * view.strides[0] * dtype_bytes(view.dtype)
        buffer: Pinned = getattr(self, name)
        if len(buffer.array) < size:
            buffer.close()
            buffer = Pinned(size)
            setattr(self, name, buffer)
        if size:
            call("cuMemcpyDtoHAsync", buffer.address, address, size, stream)
        found = buffer.array[:size].view(numpy_dtype(view.dtype)).reshape(rows, pitch)
        return found[:, : view.shape[1]] if len(view.shape) > 1 else found[:, 0]

    def take(self) -> tuple[IntArray, FloatArray]:
        """Wait, then the tokens and the logits, as copies."""
        call("cuEventSynchronize", self.event)
        tokens, logits = self.results
        return tokens.astype(np.int64), logits.astype(np.float32)

    def close(self) -> None:
        """Free the buffers."""
        self.results.clear()
        call("cuEventDestroy", self.event)
        for buffer in (self.inputs, self.tables, self.tokens, self.logits):
            buffer.close()
