"""The GPU backend: one allocation each for weights, arena, inputs and states; decode replays CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver as cu  # type: ignore[import-untyped]

from llmopt.artifact.dtypes import numpy_dtype
from llmopt.launch import LaunchPlan
from llmopt.program import Program, StateGroup, dtype_bytes
from llmopt.runtime.executors.cuda.driver import Device, call
from llmopt.runtime.executors.cuda.launches import BoundBucket, Kernels
from llmopt.runtime.executors.cuda.layout import Region, align, inputs_region, is_table, states_region, tables_region
from llmopt.runtime.executors.cuda.steps import Arrays
from llmopt.runtime.executors.cuda.weights import Pinned
from llmopt.runtime.protocol import FloatArray, IntArray

FLIGHTS = 2
"""Steps whose inputs and logits may be on their way at once: staging buffers of each kind."""


@dataclass(frozen=True)
class Layout:
    """Sizes that don't depend on how many blocks there are. ``inputs``: packed inputs of each bucket."""

    weights: Region
    tables: Region
    inputs: tuple[Region, ...]
    arena_bytes: int

    @property
    def input_bytes(self) -> int:
        """Bytes of all step inputs on the device: tables, and the largest bucket's packed inputs."""
        return self.tables.size + max(region.size for region in self.inputs)


def layout(program: Program, plan: LaunchPlan, weights: Region) -> Layout:
    """The fixed part of the device's memory."""
    packed = tuple(inputs_region(program, bucket) for bucket in plan.buckets)
    return Layout(weights, tables_region(plan), packed, align(plan.arena_bytes))


class _Flight:
    """Pinned staging of one run: packed inputs, tables, logits, and the event of its end."""

    def __init__(self, inputs: int, tables: int, logits: int) -> None:
        self.inputs, self.tables, self.logits = Pinned(inputs), Pinned(tables), Pinned(logits)
        self.event = call("cuEventCreate", cu.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self.result: npt.NDArray[Any] | None = None

    def close(self) -> None:
        self.result = None
        call("cuEventDestroy", self.event)
        for buffer in (self.inputs, self.tables, self.logits):
            buffer.close()


class GpuBackend:
    """Runs buckets on a device whose context is current. Not thread-safe."""

    def __init__(
        self,
        program: Program,
        plan: LaunchPlan,
        device: Device,
        where: Layout,
        blocks: Mapping[str, int],
        read: Callable[[str], bytes],
    ) -> None:
        self.program, self.plan, self.device, self.where, self.blocks = program, plan, device, where, blocks
        self.states = states_region(program.states, blocks)
        self.memory: list[int] = []
        self.weights = self._allocate(where.weights.size)
        self.arena = self._allocate(where.arena_bytes)
        self.tables = self._allocate(where.tables.size)
        self.inputs = self._allocate(max(region.size for region in where.inputs))
        self.kv = self._allocate(self.states.size)
        self.stream = call("cuStreamCreate", 1)
        self.kernels = Kernels(plan.kernels, read)
        self.bound: dict[int, BoundBucket] = {}
        self.flights = [self._flight() for _ in range(FLIGHTS)]
        self.runs = 0
        self._clear()

    def _allocate(self, size: int) -> int:
        address = int(call("cuMemAlloc", max(size, 256)))
        self.memory.append(address)
        return address

    def _flight(self) -> _Flight:
        rows = max(b.logits.shape[0] * b.logits.strides[0] * dtype_bytes(b.logits.dtype) for b in self.plan.buckets)
        return _Flight(max(region.size for region in self.where.inputs), self.where.tables.size, rows)

    def _clear(self) -> None:
        """Zeros where kernels expect them, and in the states, whose unwritten slots are read (and masked) too."""
        call("cuMemsetD8Async", self.kv, 0, max(self.states.size, 256), self.stream)
        call("cuMemsetD8Async", self.arena, 0, max(self.where.arena_bytes, 256), self.stream)
        call("cuMemsetD8Async", self.tables, 0, max(self.where.tables.size, 256), self.stream)
        call("cuStreamSynchronize", self.stream)

    def capture(self, buckets: list[int]) -> None:
        """Graphs for buckets."""
        for index in buckets:
            self._bind(index).capture()
        call("cuStreamSynchronize", self.stream)

    def _bind(self, index: int) -> BoundBucket:
        if index not in self.bound:
            bucket, packed = self.plan.buckets[index], self.where.inputs[index]

            def address(name: str) -> int:
                if name in bucket.offsets:
                    return self.arena + bucket.offsets[name]
                if name in packed.offsets:
                    return self.inputs + packed.offsets[name]
                if name in self.states.offsets:
                    return self.kv + self.states.offsets[name]
                if is_table(name):
                    return self.tables + self.where.tables.offsets[f"{bucket.function}/{name}"]
                return self.weights + self.where.weights.offsets[name]

            self.bound[index] = BoundBucket(bucket, self.kernels, address, self.stream)
        return self.bound[index]

    def run(self, bucket: int, inputs: Arrays, rows: int) -> int:
        """Stage and send the inputs, run the bucket, send back the first ``rows`` rows of logits."""
        bound, handle = self._bind(bucket), self.runs
        self.runs += 1
        flight = self.flights[handle % FLIGHTS]
        call("cuEventSynchronize", flight.event)
        self._send(bound, self.where.inputs[bucket], inputs, flight)
        bound.run()
        self._receive(bound, flight, rows)
        call("cuEventRecord", flight.event, self.stream)
        return handle

    def _send(self, bound: BoundBucket, packed: Region, inputs: Arrays, flight: _Flight) -> None:
        for name, value in inputs.items():
            if is_table(name):
                self._send_table(f"{bound.bucket.function}/{name}", value, self.plan.inputs[name].shape[1], flight)
                continue
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            at = packed.offsets[name]
            flight.inputs.array[at : at + len(data)] = data
        call("cuMemcpyHtoDAsync", self.inputs, flight.inputs.address, packed.size, self.stream)

    def _send_table(self, name: str, table: npt.NDArray[Any], width: int, flight: _Flight) -> None:
        """The used columns of a block table."""
        at = self.where.tables.offsets[name]
        size = table.nbytes
        flight.tables.array[at : at + size] = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
        copy = cu.CUDA_MEMCPY2D()
        copy.srcMemoryType = cu.CUmemorytype.CU_MEMORYTYPE_HOST
        copy.srcHost = flight.tables.address + at
        copy.srcPitch = table.shape[1] * table.itemsize
        copy.dstMemoryType = cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.dstDevice = self.tables + at
        copy.dstPitch = width * table.itemsize
        copy.WidthInBytes = table.shape[1] * table.itemsize
        copy.Height = table.shape[0]
        call("cuMemcpy2DAsync", copy, self.stream)

    def _receive(self, bound: BoundBucket, flight: _Flight, rows: int) -> None:
        view = bound.bucket.logits
        size = dtype_bytes(view.dtype)
        pitch = view.strides[0]
        address = self.arena + bound.bucket.offsets[view.name] + view.offset
        if rows:
            call("cuMemcpyDtoHAsync", flight.logits.address, address, rows * pitch * size, self.stream)
        raw = flight.logits.array[: rows * pitch * size].view(numpy_dtype(view.dtype))
        flight.result = raw.reshape(rows, pitch)[:, : view.shape[1]]

    def logits(self, handle: int) -> FloatArray:
        """Wait for a run; its logits in float32. Raises ExecutorError when the device failed."""
        if not self.runs - FLIGHTS <= handle < self.runs:
            raise ValueError(f"run {handle} is not in flight")
        flight = self.flights[handle % FLIGHTS]
        call("cuEventSynchronize", flight.event)
        assert flight.result is not None
        return flight.result.astype(np.float32)

    def _blocks(self, group: StateGroup) -> list[tuple[int, int]]:
        """Address and block bytes of each state of a group."""
        sizes = [s.heads * group.block_size * s.head_dim * dtype_bytes(s.dtype) for s in group.states]
        return [(self.kv + self.states.offsets[s.input], size) for s, size in zip(group.states, sizes)]

    def copy_blocks(self, group: StateGroup, source: IntArray, target: IntArray) -> None:
        """Copy blocks of every state of a group on the device."""
        for base, size in self._blocks(group):
            for a, b in zip(source.tolist(), target.tolist()):
                call("cuMemcpyDtoDAsync", base + b * size, base + a * size, size, self.stream)

    def read_blocks(self, group: StateGroup, blocks: IntArray) -> list[npt.NDArray[np.uint8]]:
        """Blocks of every state of a group, on the host, each (blocks, bytes)."""
        found = []
        for base, size in self._blocks(group):
            data = np.empty((len(blocks), size), np.uint8)
            for row, block in zip(data, blocks.tolist()):
                call("cuMemcpyDtoHAsync", row.ctypes.data, base + block * size, size, self.stream)
            found.append(data)
        call("cuStreamSynchronize", self.stream)
        return found

    def write_blocks(self, group: StateGroup, blocks: IntArray, data: list[npt.NDArray[np.uint8]]) -> None:
        """Inverse of read_blocks."""
        for (base, size), rows in zip(self._blocks(group), data):
            for row, block in zip(rows, blocks.tolist()):
                call("cuMemcpyHtoDAsync", base + block * size, row.ctypes.data, size, self.stream)
        call("cuStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free everything; idempotent. A device that failed is left to the driver."""
        if not self.memory:
            return
        memory, self.memory = self.memory, []
        call("cuStreamSynchronize", self.stream)
        for bound in self.bound.values():
            bound.close()
        self.kernels.close()
        for flight in self.flights:
            flight.close()
        for address in memory:
            call("cuMemFree", address)
        call("cuStreamDestroy", self.stream)
        self.device.close()
