"""What the numbers were measured on: processor, memory bandwidth, memory in use, commit."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(threads: int = 0, size: int = 256 << 20, repeat: int = 5) -> float:
    """Bytes a second all threads together read from memory: the best of ``repeat`` sweeps over ``size`` bytes.

    The sweep is a maximum over int64: one vector instruction a load, so the memory is what limits it, and numpy
    lets other threads run meanwhile.
    """
    threads = threads or cores()
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        best = min(_timed(lambda: list(pool.map(np.max, parts))) for _ in range(repeat))
    return size / best


def _timed(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes (mapped weights count once they were read)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
