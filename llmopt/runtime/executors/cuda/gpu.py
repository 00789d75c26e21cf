"""The GPU backend: one allocation each for weights, arena, inputs and states; decode replays CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.errors import ExecutorError
from llmopt.launch import Bucket, LaunchPlan
from llmopt.program import Program, StateGroup, dtype_bytes
from llmopt.runtime.executors.cuda.backend import Result, Tail
from llmopt.runtime.executors.cuda.driver import Device, call
from llmopt.runtime.executors.cuda.launches import BoundLaunches, Kernels
from llmopt.runtime.executors.cuda.layout import (
    Region,
    align,
    inputs_region,
    is_table,
    persistent_region,
    states_region,
    tables_region,
)
from llmopt.runtime.executors.cuda.staging import Flight
from llmopt.runtime.executors.cuda.steps import Arrays
from llmopt.runtime.protocol import IntArray

log = logging.getLogger("llmopt.cuda")

CAPTURE_AT = 3
"""Run at which an extend bucket becomes a graph. On an H200 the graph of 25 launches saves 27 us of 500 and the host
125 us a run, and takes some 2 ms to make: not worth it for a bucket that one odd prompt length runs once."""


@dataclass(frozen=True)
class Layout:
    """Sizes that don't depend on how many blocks there are. ``inputs``: packed inputs of each bucket."""

    weights: Region
    tables: Region
    persistent: Region
    inputs: tuple[Region, ...]
    arena_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of the largest bucket's packed inputs."""
        return max(region.size for region in self.inputs)

    @property
    def input_bytes(self) -> int:
        """Bytes of everything that carries state or inputs between host and device, KV apart."""
        return self.tables.size + self.persistent.size + self.packed_bytes


def layout(plan: LaunchPlan, weights: Region) -> Layout:
    """The fixed part of the device's memory."""
    packed = tuple(inputs_region(bucket) for bucket in plan.buckets)
    return Layout(weights, tables_region(plan), persistent_region(plan), packed, align(plan.arena_bytes))


@dataclass
class Bound:
    """A bucket at its addresses: the forward launches, and the two sets that draw tokens; ``runs`` so far."""

    bucket: Bucket
    forward: BoundLaunches
    greedy: BoundLaunches
    sampling: BoundLaunches
    runs: int = 0

    def parts(self) -> tuple[BoundLaunches, ...]:
        """What becomes a graph each."""
        return self.forward, self.greedy, self.sampling

    def capture(self) -> None:
        """One graph for each part."""
        for part in self.parts():
            part.capture()


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
        self.plan, self.device, self.where, self.blocks = plan, device, where, blocks
        self.states = states_region(program.states, blocks)
        self.memory: list[int] = []
        self.stream = call("cuStreamCreate", 1)
        self.weights = self._allocate(where.weights.size)
        self.arena = self._allocate(where.arena_bytes, clear=True)
        self.tables = self._allocate(where.tables.size, clear=True)
        self.persistent = self._allocate(where.persistent.size, clear=True)
        self.inputs = self._allocate(where.packed_bytes)
        # Slots that nothing wrote yet are read and masked: whatever they hold must be finite.
        self.kv = self._allocate(self.states.size, clear=True)
        call("cuStreamSynchronize", self.stream)
        self.kernels = Kernels(plan.kernels, read)
        self.bound: dict[int, Bound] = {}
        self.idle: list[Flight] = []
        self.flying: dict[int, tuple[int, Flight]] = {}
        self.kept: list[tuple[int, npt.NDArray[Any]]] = []
        self.sent: dict[str, npt.NDArray[Any]] = {}
        self.runs = 0

    def _allocate(self, size: int, clear: bool = False) -> int:
        address = int(call("cuMemAlloc", max(size, 256)))
        self.memory.append(address)
        if clear:
            call("cuMemsetD8Async", address, 0, max(size, 256), self.stream)
        return address

    def capture(self, buckets: list[int]) -> None:
        """Graphs for buckets."""
        for index in buckets:
            self.bind(index).capture()
        call("cuStreamSynchronize", self.stream)

    def bind(self, index: int) -> Bound:
        """A bucket's launches with addresses; kernels are loaded at their first use."""
        if index not in self.bound:
            bucket = self.plan.buckets[index]

            def address(name: str) -> int:
                return self._address(index, name)

            parts = (bucket.launches, bucket.greedy, bucket.sampling)
            forward, greedy, sampling = (BoundLaunches(x, self.kernels, address, self.stream) for x in parts)
            self.bound[index] = Bound(bucket, forward, greedy, sampling)
        return self.bound[index]

    def _address(self, index: int, name: str) -> int:
        """Where a bucket's launches find a value."""
        bucket, packed = self.plan.buckets[index], self.where.inputs[index]
        if name in bucket.offsets:
            return self.arena + bucket.offsets[name]
        if name in packed.offsets:
            return self.inputs + packed.offsets[name]
        if name in self.states.offsets:
            return self.kv + self.states.offsets[name]
        if name in self.where.persistent.offsets:
            return self.persistent + self.where.persistent.offsets[name]
        if is_table(name):
            return self.tables + self.where.tables.offsets[f"{bucket.function}/{name}"]
        return self.weights + self.where.weights.offsets[name]

    def keep(self, place: int, rows: Arrays) -> None:
        """Note rows of persistent buffers; they go up with the next forward pass."""
        for name, row in rows.items():
            view = self.plan.persistent[name]
            at = self.where.persistent.offsets[name] + place * view.strides[0] * dtype_bytes(view.dtype)
            self.kept.append((self.persistent + at, row))

    def forward(self, bucket: int, inputs: Arrays) -> int:
        """Stage and send the inputs, run the bucket."""
        bound = self.bind(bucket)
        flight = self.idle.pop() if self.idle else Flight(self.where.packed_bytes, self.where.tables.size)
        flight.send_rows(self.kept, self.stream)
        self.kept = []
        flight.send(self.where.inputs[bucket], self.inputs, inputs, self.stream)
        for name, value in inputs.items():
            if is_table(name):
                self._send_table(flight, bound.bucket, name, value)
        bound.runs += 1
        if bound.runs == CAPTURE_AT and bound.forward.graph is None:
            bound.capture()
        bound.forward.run()
        self.runs += 1
        self.flying[self.runs] = (bucket, flight)
        return self.runs

    def _send_table(self, flight: Flight, bucket: Bucket, name: str, table: npt.NDArray[Any]) -> None:
        """Send a block table, unless it is the last that was sent: most steps give no sequence another block."""
        place = f"{bucket.function}/{name}"
        if np.array_equal(self.sent.get(place, ()), table):
            return
        at = self.where.tables.offsets[place]
        flight.send_table(at, self.tables + at, table, bucket.inputs[name].shape[1], self.stream)
        self.sent[place] = table.copy()

    def finish(self, handle: int, tail: Tail) -> None:
        """Send the masks, draw, and send back what is wanted."""
        index, flight = self.flying[handle]
        bound = self.bound[index]
        flight.send_masks(tail.masks, self._address(index, "masks"), self.stream)
        if tail.draw == "greedy":
            bound.greedy.run()
        elif tail.draw == "full":
            bound.sampling.run()
        views = {"tokens": bound.bucket.sampled, "reports": bound.bucket.reports, "logits": bound.bucket.logits}
        places = {name: (view, self._address(index, view.name) + view.offset) for name, view in views.items()}
        flight.receive(places, tail, self.stream)

    def result(self, handle: int) -> Result:
        """Wait for a run, once. Raises ExecutorError when the device failed."""
        _, flight = self.flying.pop(handle)
        found = flight.take()
        self.idle.append(flight)
        return found

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
        """Free everything; idempotent. After a fault the context is lost: the driver frees it with the process."""
        if not self.memory:
            return
        memory, self.memory = self.memory, []
        try:
            call("cuStreamSynchronize", self.stream)
        except ExecutorError as error:
            log.info("the device cannot be cleaned up: %s", error)
            return
        for bound in self.bound.values():
            for part in bound.parts():
                part.close()
        self.kernels.close()
        for flight in (*self.idle, *(flight for _, flight in self.flying.values())):
            flight.close()
        for address in memory:
            call("cuMemFree", address)
        call("cuStreamDestroy", self.stream)
        self.device.close()
