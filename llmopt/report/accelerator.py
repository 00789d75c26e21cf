"""The GPU figures were measured on: its name, what its memory gives, how much of it is taken (needs cuda-bindings)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from llmopt.report.machine import Machine
from llmopt.runtime.executors.cuda.driver import Device, call, open_device

COPIED = 1 << 30
REPEAT = 8


def probe_gpu(device: str) -> Machine:
    """The GPU named ``cuda`` or ``cuda:1``, and the bytes a second that copies inside its memory read and write: on an
    H200 4.2 TB/s, where a kernel that only reads reaches 4.4.

    Call it while nothing else runs there. Raises ConfigError for another device, ResourceError when it is not there,
    or has no room for two buffers of COPIED bytes.
    """
    with opened(device) as gpu:
        return Machine(gpu.name, copy_bandwidth(), device)


def taken_bytes(device: str) -> int:
    """Bytes of a GPU's memory that are not free, whoever took them."""
    with opened(device) as gpu:
        free, total = gpu.free_bytes()
        return total - free


def copy_bandwidth() -> float:
    """Bytes a second read and written by the fastest of REPEAT copies from one buffer to another."""
    buffers: list[int] = []
    stream = call("cuStreamCreate", 1)
    try:
        buffers += (int(call("cuMemAlloc", COPIED)) for _ in range(2))
        source, target = buffers
        events = [call("cuEventCreate", 0) for _ in range(REPEAT + 1)]
        call("cuMemcpyDtoDAsync", target, source, COPIED, stream)
        for event in events:
            call("cuEventRecord", event, stream)
            call("cuMemcpyDtoDAsync", target, source, COPIED, stream)
        call("cuStreamSynchronize", stream)
        best = min(call("cuEventElapsedTime", a, b) for a, b in pairwise(events))
        for event in events:
            call("cuEventDestroy", event)
    finally:
        for buffer in buffers:
            call("cuMemFree", buffer)
        call("cuStreamDestroy", stream)
    return float(2e3 * COPIED / best)


@contextmanager
def opened(device: str) -> Iterator[Device]:
    """A GPU whose context is current meanwhile."""
    gpu = open_device(device)
    try:
        yield gpu
    finally:
        gpu.close()
