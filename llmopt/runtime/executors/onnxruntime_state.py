"""KV slots of the onnxruntime executor: buffers a graph reads and writes by address, and operations on slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from llmopt.errors import ExecutorError, ResourceError
from llmopt.program import StateGroup, dtype_bytes
from llmopt.runtime.executors.onnxruntime_session import device_of, new_session
from llmopt.runtime.protocol import StateOp
from llmopt.target import LoadOptions

Array = npt.NDArray[Any]


class Memory(Protocol):
    """State tensors (slots, heads, capacity, width) by name, on some device."""

    def address(self, name: str, slot: int) -> int:
        """Address of a slot of a state."""
        ...

    def read(self, slot: int) -> list[Array]:
        """Host copies of a slot of every state, each (1, heads, capacity, width)."""
        ...

    def write(self, slot: int, values: Sequence[Array]) -> None:
        """Inverse of read."""
        ...

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy (at least) the first ``tokens`` tokens of a slot of every state."""
        ...


class HostMemory:
    """States as numpy arrays, zero-filled: the system backs a slot with memory when it is first written."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
        self.arrays = {name: np.zeros(shape, np.dtype(dtype)) for name, shape in shapes.items()}

    def address(self, name: str, slot: int) -> int:
        array = self.arrays[name]
        return int(array.ctypes.data + slot * array.strides[0])

    def read(self, slot: int) -> list[Array]:
        return [a[slot : slot + 1].copy() for a in self.arrays.values()]

    def write(self, slot: int, values: Sequence[Array]) -> None:
        for array, value in zip(self.arrays.values(), values, strict=True):
            array[slot] = value[0]

    def copy(self, source: int, target: int, tokens: int) -> None:
        for array in self.arrays.values():
            array[target, :, :tokens] = array[source, :, :tokens]


class DeviceMemory:
    """States as OrtValues; slots move by running the one-node copy model with both ends bound by address.

    Zero at first: GroupQueryAttention of the CUDA provider reads positions past a sequence's end, and memory that held
    something else may hold NaN (seen on an H200: every logit of most float16 models).
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str, copier: bytes, options: LoadOptions) -> None:
        self.device, self.index = device_of(options)
        self.dtype, self.shapes = np.dtype(dtype), shapes
        self.session = new_session(copier, ort.SessionOptions(), options)
        self.values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.dtype), self.device, self.index)
            for name, shape in shapes.items()
        }

    def address(self, name: str, slot: int) -> int:
        stride = int(np.prod(self.shapes[name][1:])) * self.dtype.itemsize
        return int(self.values[name].data_ptr()) + slot * stride

    def read(self, slot: int) -> list[Array]:
        found = []
        for name, shape in self.shapes.items():
            array: Array = np.empty((1, *shape[1:]), self.dtype)
            self._move(shape, (self.device, self.index, self.address(name, slot)), ("cpu", 0, array.ctypes.data))
            found.append(array)
        return found

    def write(self, slot: int, values: Sequence[Array]) -> None:
        for (name, shape), value in zip(self.shapes.items(), values, strict=True):
            self._move(shape, ("cpu", 0, value.ctypes.data), (self.device, self.index, self.address(name, slot)))

    def copy(self, source: int, target: int, tokens: int) -> None:
        for name, shape in self.shapes.items():
            ends = [(self.device, self.index, self.address(name, slot)) for slot in (source, target)]
            self._move(shape, *ends)

    def _move(self, shape: tuple[int, ...], source: tuple[str, int, int], target: tuple[str, int, int]) -> None:
        binding, block = self.session.io_binding(), (1, *shape[1:])
        binding.bind_input("source", source[0], source[1], self.dtype, block, source[2])
        binding.bind_output("target", target[0], target[1], self.dtype, block, target[2])
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()


class SlotStates:
    """Slots of one state group: ``capacity`` is one position more than the context.

    A decode call covers a contiguous range of slots, and those in it that have no row still get one: it writes
    behind their last token, which the spare position makes possible for a full slot too. ``lengths`` keeps
    how many tokens of each slot must survive.
    """

    def __init__(self, group: StateGroup, context: int, copier: bytes, options: LoadOptions) -> None:
        self.group, self.context, self.capacity = group, context, context + 1
        self.slots = slots_for(group, self.capacity, options)
        self.dtype = group.states[0].dtype
        self.shapes: dict[str, tuple[int, ...]] = {
            s.input: (self.slots, s.heads, self.capacity, s.head_dim) for s in group.states
        }
        self.device, self.index = device_of(options)
        self.memory = self._allocate(copier, options)
        self.lengths = np.zeros(self.slots, np.int64)
        self.swapped: dict[int, list[tuple[int, list[Array]]]] = {}

    def _allocate(self, copier: bytes, options: LoadOptions) -> Memory:
        try:
            if self.device == "cpu":
                return HostMemory(self.shapes, self.dtype)
            return DeviceMemory(self.shapes, self.dtype, copier, options)
        except (MemoryError, ort.capi.onnxruntime_pybind11_state.RuntimeException) as error:
            size = sum(int(np.prod(s)) for s in self.shapes.values()) * dtype_bytes(self.dtype)
            hint = "lower the context or the number of sequences"
            raise ResourceError(f"{size >> 20} MiB of KV state do not fit on {self.device}", hint=hint) from error

    def wrote(self, slots: Sequence[int], ends: Sequence[int]) -> None:
        """Rows of these slots now end at these lengths."""
        self.lengths[list(slots)] = ends

    def apply(self, op: StateOp) -> None:
        """Do one state operation; raises ExecutorError for a slot or key that does not exist."""
        source, target = op.source.tolist(), op.target.tolist()
        if any(not 0 <= slot < self.slots for slot in (*source, *target)):
            raise ExecutorError(f"{op.kind} names a slot outside 0..{self.slots - 1}")
        match op.kind:
            case "copy" | "move":
                self._copy(source, target, op.length or self.capacity)
            case "swap_out":
                self.swapped[op.key] = [(int(self.lengths[slot]), self.memory.read(slot)) for slot in source]
            case "swap_in":
                if op.key not in self.swapped:
                    raise ExecutorError(f"swap_in of key {op.key}, which was never swapped out")
                for slot, (length, values) in zip(target, self.swapped.pop(op.key), strict=True):
                    self.memory.write(slot, values)
                    self.lengths[slot] = length
            case "swap_drop":
                self.swapped.pop(op.key, None)
            case "truncate":
                self.lengths[source] = np.minimum(self.lengths[source], op.length)

    def _copy(self, source: list[int], target: list[int], tokens: int) -> None:
        """Every source is read before any target is written, as if all happened at once."""
        lengths = np.minimum(self.lengths[source], tokens)
        if set(source) & set(target):
            held = [self.memory.read(slot) for slot in source]
            for slot, values in zip(target, held, strict=True):
                self.memory.write(slot, values)
        else:
            for a, b in zip(source, target, strict=True):
                self.memory.copy(a, b, min(tokens, int(self.lengths[a])))
        self.lengths[target] = lengths

    def close(self) -> None:
        """Free the buffers."""
        self.swapped.clear()
        self.__dict__.pop("memory", None)


def slots_for(group: StateGroup, capacity: int, options: LoadOptions) -> int:
    """Slots to reserve; raises ResourceError when ``kv_bytes`` holds none."""
    one = sum(s.heads * s.head_dim * dtype_bytes(s.dtype) for s in group.states) * capacity
    if options.kv_bytes is None:
        return options.max_sequences
    if options.kv_bytes < one:
        hint = "raise the KV memory or lower the context"
        raise ResourceError(f"one sequence of {capacity - 1} tokens needs {one} bytes of KV state", hint=hint)
    return min(options.max_sequences, options.kv_bytes // one)
