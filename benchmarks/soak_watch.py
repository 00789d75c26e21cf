"""Watches a server from a process of its own: how quickly /health answers, how much memory its processes hold.

    python benchmarks/soak_watch.py HOST PORT PID…

Samples until its standard input ends, then prints one JSON document.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.25
"""Seconds between samples."""


@dataclass
class Seen:
    """``health``: milliseconds an answer took; ``statuses``: those that were not 200; ``memory``: bytes by process;
    ``lag``: milliseconds by which the watcher itself woke late, which is the machine's doing."""

    health: list[float]
    statuses: list[int]
    memory: list[list[int]]
    lag: list[float]


class Watcher:
    """The watching process."""

    def __init__(self, host: str, port: int, pids: tuple[int, ...]) -> None:
        command = [sys.executable, __file__, host, str(port), *map(str, pids)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stop(self) -> Seen:
        """What it saw."""
        text, _ = self._process.communicate(timeout=60)
        return Seen(**json.loads(text))


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def watch(host: str, port: int, pids: list[int]) -> Seen:
    """Sample until standard input ends; every request on a connection of its own, as a prober would."""
    seen, due = Seen([], [], [], []), time.perf_counter() + EVERY
    while not select.select([sys.stdin], [], [], EVERY)[0]:
        begun = time.perf_counter()
        seen.lag.append((begun - due) * 1e3)
        connection = http.client.HTTPConnection(host, port, timeout=30)
        connection.request("GET", "/health")
        status = connection.getresponse().status
        connection.close()
        seen.health.append((time.perf_counter() - begun) * 1e3)
        if status != 200:
            seen.statuses.append(status)
        seen.memory.append([resident(pid) for pid in pids])
        due = time.perf_counter() + EVERY
    return seen


if __name__ == "__main__":
    print(json.dumps(vars(watch(sys.argv[1], int(sys.argv[2]), [int(pid) for pid in sys.argv[3:]]))))
