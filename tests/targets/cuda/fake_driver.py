"""A CUDA driver made of host memory: copies are real, kernels do nothing, faults happen where a test wants them."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda.bindings import driver as real

CONTEXTUAL = ("cuMem", "cuStream", "cuEvent", "cuGraph", "cuModule", "cuLaunch")
"""Functions that need a context made current in the calling thread."""

OK = real.CUresult.CUDA_SUCCESS


@dataclass
class FakeDriver:
    """Stands in for cuda.bindings.driver. ``devices``: (name, compute capability) of each GPU; CUDA_VISIBLE_DEVICES
    hides some. ``version``: of the driver. ``free``: bytes. ``faults``: function name → (calls that still succeed,
    error of the one after); a sticky error answers every later call as well."""

    devices: tuple[tuple[str, int], ...] = (("NVIDIA H200", 90),)
    version: int = 13000
    free: int = 1 << 32
    faults: Mapping[str, tuple[int, Any]] = field(default_factory=dict)
    multiprocessors: int = 132
    memory: dict[int, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    dead: Any = None
    current: threading.local = field(default_factory=threading.local)

    def __getattr__(self, name: str) -> Any:
        """Functions, wrapped; enumerations and structures as they are."""
        if name.startswith("cu") and not name.startswith("cuuint"):
            return lambda *args: self._call(name, args)
        return getattr(real, name)

    def _call(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.calls.append(name)
        left, error = self.faults.get(name, (self.calls.count(name), None))
        if self.dead is None and self.calls.count(name) > left:
            if isinstance(error, Exception):
                raise error
            self.dead = error
        if self.dead is not None:
            return (self.dead, None)
        if name.startswith(CONTEXTUAL) and not hasattr(self.current, "context"):
            return (real.CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
        values = getattr(self, f"do_{name}", lambda *_: 1)(*args)
        return (OK, *values) if isinstance(values, tuple) else (OK, values)

    def visible(self) -> list[tuple[str, int]]:
        """The GPUs CUDA_VISIBLE_DEVICES leaves."""
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        if listed is None:
            return list(self.devices)
        return [self.devices[int(i)] for i in listed.split(",") if i and int(i) < len(self.devices)]

    def do_cuCtxSetCurrent(self, context: Any) -> None:
        self.current.context = context

    def do_cuStreamCreate(self, flags: int) -> Any:
        return real.CUstream(1)

    def do_cuTensorMapEncodeTiled(self, *_: Any) -> Any:
        return SimpleNamespace(opaque=range(16))

    def do_cuDeviceGetCount(self) -> int:
        return len(self.visible())

    def do_cuDeviceGet(self, index: int) -> int:
        return index

    def do_cuDeviceGetName(self, size: int, device: int) -> bytes:
        return self.visible()[device][0].encode().ljust(size, b"\0")

    def do_cuDeviceGetAttribute(self, attribute: Any, device: int) -> int:
        if attribute == real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            return self.multiprocessors
        major = attribute == real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return divmod(self.visible()[device][1], 10)[not major]

    def do_cuDriverGetVersion(self) -> int:
        return self.version

    def do_cuMemGetInfo(self) -> tuple[int, int]:
        return self.free, self.free

    def do_cuMemAlloc(self, size: int) -> int:
        array = np.full(size, 0xFF, np.uint8)
        self.memory[array.ctypes.data] = array
        return int(array.ctypes.data)

    def do_cuMemHostAlloc(self, size: int, flags: int) -> int:
        return self.do_cuMemAlloc(size)

    def do_cuMemFree(self, address: int) -> None:
        del self.memory[address]

    def do_cuMemFreeHost(self, address: int) -> None:
        del self.memory[address]

    def do_cuMemsetD8Async(self, address: int, value: int, size: int, stream: Any) -> None:
        ctypes.memset(address, value, size)

    def do_cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: Any) -> None:
        ctypes.memmove(target, source, size)

    do_cuMemcpyDtoHAsync = do_cuMemcpyDtoDAsync = do_cuMemcpyHtoDAsync
