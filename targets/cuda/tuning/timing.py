"""Times the entries of a bundle on this machine's GPU, through the driver: no Triton, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmopt.errors import LlmoptError, ResourceError

from .bundle import Bundle, Entry
from .check import linear_error, sample_of

POOL = 3 << 30
"""Bytes that the large operands rotate through: many times the L2."""
WORK = 3 << 30
GRAPH_US = 2000.0
REPLAYS = 9
HOPELESS = 1.4
"""A configuration this much slower than the best in its first replays is not timed further."""
FILLED = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int8")
"""Types of the buffers that are filled: the bits of small bfloat16 numbers are numbers of each."""
WRONG = 0.02
"""Error relative to the largest value from which a result is wrong."""


@dataclass(frozen=True)
class Timed:
    """Microseconds of a launch: median, 20th and 80th percentile; the error of a sample (None: nothing to compare)."""

    us: float
    p20: float
    p80: float
    error: float | None


class Timer(Protocol):
    """Runs entries of one bundle."""

    def describe(self) -> dict[str, Any]:
        """What every row says of the machine."""
        ...

    def time(self, entry: Entry, best: float) -> Timed:
        """Time an entry; ``best`` is its key's best time so far. Raises LlmoptError when it cannot run."""
        ...


@dataclass(frozen=True)
class Row:
    """A timed entry."""

    entry: Entry
    timed: Timed

    @property
    def right(self) -> bool:
        """Whether the result was what it should be; NaN is not."""
        return self.timed.error is None or self.timed.error < WRONG


def measure(bundle: Bundle, timer: Timer, progress: Callable[[str, int, int], None]) -> tuple[list[Row], list[str]]:
    """Every entry's times, and a line for each that could not run. Raises ExecutorError when the GPU is lost."""
    rows: list[Row] = []
    failed: list[str] = []
    best: dict[tuple[str, str], float] = {}
    for number, entry in enumerate(bundle.entries):
        key = (entry.kernel, entry.key)
        try:
            timed = timer.time(entry, best.get(key, float("inf")))
        except LlmoptError as error:
            if "dead" in str(error) or isinstance(error, ResourceError):
                raise
            failed.append(f"{entry.kernel} {entry.key} {entry.config}: {error}")
            continue
        rows.append(Row(entry, timed))
        if rows[-1].right:
            best[key] = min(best.get(key, timed.us), timed.us)
        progress("timing candidates", number + 1, len(bundle.entries))
    return rows, failed


def winners(rows: list[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """The fastest right configuration of each key, by kernel, as a table keeps them."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.entry.kernel, row.entry.key)
        if row.right and (key not in best or row.timed.us < best[key].timed.us):
            best[key] = row
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for _, row in sorted(best.items()):
        found.setdefault(row.entry.kernel, {})[row.entry.key] = {**row.entry.config, "us": row.timed.us}
    return found


class GpuTimer:
    """Times by CUDA graphs of launches whose large operands move through a pool larger than the L2."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        """Open the GPU. Raises ResourceError without a usable GPU, or one of another architecture."""
        from llmopt.runtime.executors.cuda.driver import call, check_driver, open_device
        from llmopt.runtime.executors.cuda.launches import Kernels

        self.device = open_device(device)
        if self.device.arch != bundle.arch:
            what = f"this GPU is sm_{self.device.arch}, the bundle holds kernels for sm_{bundle.arch}"
            raise ResourceError(what, hint=f"build it with target_options: {{archs: [{self.device.arch}]}}")
        check_driver(self.device.driver, bundle.cuda)
        self.bundle, self.call = bundle, call
        self.kernels = Kernels(bundle.cubins, bundle.read_cubin)
        self.stream = call("cuStreamCreate", 0)
        self.pool, self.work = int(call("cuMemAlloc", POOL)), int(call("cuMemAlloc", WORK))
        self.samples: dict[tuple[str, str], Any] = {}
        random = np.random.default_rng(0)
        self.chunk = finite(bfloat16(random.standard_normal(1 << 24, np.float32) * 0.05))
        for at in range(0, POOL, self.chunk.nbytes):
            call("cuMemcpyHtoD", self.pool + at, self.chunk.ctypes.data, self.chunk.nbytes)

    def describe(self) -> dict[str, Any]:
        """GPU, driver and compiler."""
        return {"gpu": self.device.name, "driver": self.device.driver, "compiler": self.bundle.compiler}

    def place(self, entry: Entry) -> dict[str, int]:
        """Addresses of the buffers that do not rotate, filled. Raises ResourceError when they do not fit."""
        found, at = {}, self.work
        for name, buffer in entry.buffers.items():
            if buffer.kind == "pool":
                continue
            if at + buffer.bytes > self.work + WORK:
                raise ResourceError(f"{entry.kernel} {entry.key} needs more than {WORK >> 30} GiB beside its weights")
            found[name] = at
            if buffer.kind == "data":
                data = np.array(buffer.data, buffer.dtype)
                self.call("cuMemcpyHtoD", at, data.ctypes.data, data.nbytes)
            elif buffer.kind == "zero" or buffer.dtype not in FILLED:
                self.call("cuMemsetD8", at, 0, buffer.bytes)
            else:
                for start in range(0, buffer.bytes, self.chunk.nbytes):
                    size = min(self.chunk.nbytes, buffer.bytes - start)
                    self.call("cuMemcpyDtoD", at + start, self.pool + start % POOL, size)
            at += -(-buffer.bytes // 1024) * 1024
        return found

    def time(self, entry: Entry, best: float) -> Timed:
        """Capture, replay, compare."""
        from cuda.bindings import driver as cu  # type: ignore[import-untyped]

        from llmopt.runtime.executors.cuda.launches import BoundLaunch

        address = self.place(entry)
        count = int(min(max(GRAPH_US / max(entry.bytes / 4.4e6, entry.flops / 7e8, 2.0), 4), 300))
        pooled = {n: -(-b.bytes // 1024) * 1024 for n, b in entry.buffers.items() if b.kind == "pool"}
        span = sum(pooled.values())
        call, bound = self.call, []
        for number in range(count):
            base = self.pool + (number * span % (POOL - span) // 1024 * 1024 if span else 0)
            for name, size in pooled.items():
                address[name], base = base, base + size
            for launch in entry.launches:
                cubin, function = self.bundle.cubins[launch.kernel], self.kernels.get(launch.kernel)
                bound.append(BoundLaunch(launch, cubin, function, address.__getitem__, self.stream))
        call("cuStreamBeginCapture", self.stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        for ready in bound:
            ready()
        graph = call("cuStreamEndCapture", self.stream)
        runner = call("cuGraphInstantiate", graph, 0)
        start, stop = call("cuEventCreate", 0), call("cuEventCreate", 0)
        times: list[float] = []
        while len(times) < REPLAYS + 2 and not (len(times) == 3 and min(times) > HOPELESS * best):
            call("cuEventRecord", start, self.stream)
            call("cuGraphLaunch", runner, self.stream)
            call("cuEventRecord", stop, self.stream)
            call("cuStreamSynchronize", self.stream)
            times.append(call("cuEventElapsedTime", start, stop) * 1000 / count)
        call("cuGraphExecDestroy", runner)
        call("cuGraphDestroy", graph)
        low, median, high = (round(float(t), 3) for t in np.percentile(times[2:], [20, 50, 80]))
        return Timed(median, low, high, self.error(entry, address))

    def error(self, entry: Entry, address: dict[str, int]) -> float | None:
        """Against float64 for a linear; else against the first configuration of the key, whose own error is unknown."""
        if entry.check is not None:
            return linear_error(entry, lambda name, at, n: self.read(address[name] + at, n, entry.out[1]))
        name, dtype, count = entry.out
        found = sample_of(lambda at, n: self.read(address[name] + at, n, dtype), dtype, count)
        first = self.samples.setdefault((entry.kernel, entry.key), found)
        if not np.isfinite(found).all() or not np.abs(found).max() > 0:
            return float("inf")
        return None if first is found else float(np.abs(found - first).max() / np.abs(first).max())

    def read(self, at: int, count: int, dtype: str) -> Any:
        """Numbers at an address, as float64."""
        raw = np.empty(count, np.uint16 if dtype == "bfloat16" else dtype)
        self.call("cuMemcpyDtoH", raw.ctypes.data, at, raw.nbytes)
        return ((raw.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else raw).astype(np.float64)


def bfloat16(x: Any) -> Any:
    """float32 as the upper halves of its bits, rounded to nearest."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def finite(bits: Any) -> Any:
    """Halfwords whose lower byte is no NaN of E4M3 either: its last bit is taken."""
    return bits & ~((bits & 0x7F) == 0x7F).astype(np.uint16)


def row_fields(row: Row, machine: dict[str, Any]) -> dict[str, Any]:
    """A row as benchmarks keep it, in one line of JSON."""
    entry, timed = row.entry, row.timed
    return {
        **machine, "model": entry.model, "what": entry.what, "kernel": entry.kernel, "key": entry.key,
        "config": entry.config, "bytes": entry.bytes, "flops": entry.flops, "us": timed.us, "p20": timed.p20,
        "p80": timed.p80, "error": timed.error, "gbps": round(entry.bytes / timed.us / 1000, 1),
        "tflops": round(entry.flops / timed.us / 1e6, 1),
    }  # fmt: skip


def time_bundle(
    bundle: Bundle, device: str, progress: Callable[[str, int, int], None]
) -> tuple[list[Row], list[str], dict[str, Any]]:
    """Rows, failures and the machine's description, by this machine's GPU."""
    timer = GpuTimer(bundle, device)
    rows, failed = measure(bundle, timer, progress)
    return rows, failed, timer.describe()
