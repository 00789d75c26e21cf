"""What the numbers were measured on: processor, memory bandwidth, memory in use, commit."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmopt.errors import ResourceError


@dataclass(frozen=True)
class Machine:
    """What ran: the processor's or GPU's name, the bytes a second its memory gives, the device as --device says."""

    name: str
    bandwidth: float
    device: str = "cpu"

    def taken(self) -> int | None:
        """Bytes of the GPU's memory that are not free, whoever took them; None on the CPU."""
        if self.device == "cpu":
            return None
        from llmopt.report.accelerator import taken_bytes

        return taken_bytes(self.device)


VECTORS = (("amx_int8", "AMX"), ("avx512_vnni", "AVX512-VNNI"), ("avx512f", "AVX512"), ("avx2", "AVX2"))


def probe_machine(device: str, threads: int = 0) -> Machine:
    """What an executor on ``device`` runs on. Raises what ``probe_gpu`` raises, ResourceError without cuda-bindings."""
    if device == "cpu":
        return Machine(processor(), probe_bandwidth(threads))
    try:
        from llmopt.report.accelerator import probe_gpu
    except ImportError as error:
        what = "a GPU's name and bandwidth are asked for through cuda-bindings"
        raise ResourceError(what, where=f"--device {device}", hint="pip install 'llmopt[cuda]'") from error
    return probe_gpu(device)


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def probe_bandwidth(threads: int = 0) -> float:
    """read_bandwidth measured in a process of its own: its buffer must not count as this one's memory."""
    command = (sys.executable, "-m", "llmopt.report.machine", str(threads))
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read_bandwidth(threads: int = 0, size: int = 256 << 20, repeat: int = 5) -> float:
    """Bytes a second all threads together read from memory: the best of ``repeat`` sweeps over ``size`` bytes.

    The sweep is a float32 dot product of each part with itself: of what numpy offers the least work a load, so
    the memory is what limits it, and other threads run meanwhile.
    """
    threads = threads or cores()
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        best = min(_timed(lambda: list(pool.map(np.dot, parts, parts))) for _ in range(repeat))
    return size / best


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes (mapped weights count once they were read)."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also count the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor() -> str:
    """The processor's name; on x86 with family, model and widest vectors: virtual machines hide the model's number."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    first = dict(line.split("\t", 1) for line in text.partition("\n\n")[0].splitlines() if "\t" in line)
    facts = {key.strip(): value.strip(" \t:") for key, value in first.items()}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    if "cpu family" not in facts:
        return facts["model name"]
    flags = facts.get("flags", "").split()
    vectors = next((name for flag, name in VECTORS if flag in flags), "no AVX2")
    return f"{facts['model name']} ({facts['cpu family']}/{facts['model']}, {vectors})"


def commit() -> str | None:
    """Short hash of the checkout llmopt runs from, ``+`` when it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(("git", "-C", str(root), *arguments), capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(read_bandwidth(int(sys.argv[1])))
