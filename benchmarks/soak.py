"""Soaks a server on this machine: a mix of requests, good and bad, until a number or a time is reached; then a verdict.

    python benchmarks/soak.py build/demo --requests 10000
    python benchmarks/soak.py build/demo --minutes 10 --append benchmarks/rows/serve/soak.jsonl

Checked: every request ends once and as it must, none hangs, greedy answers never change, memory of both processes is
flat (at rest, after warm-up against at the end), /health stays quick, and nothing is held at the end: no request, no
sequence, no KV block. ``--kill-engine`` kills the engine process at the end, with requests in flight: each must hear of
it in 2 s, and the server must exit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.soak_requests import KINDS, REFUSALS, Outcome, Soak, one, refusal, streamed
from benchmarks.soak_watch import Seen, Watcher, resident
from llmopt.loadgen.http import HttpPool, parse_url
from llmopt.report.machine import commit, cores, processor

WARM = 0.2
"""Share of the run in which memory may still grow."""
FLAT = 0.03
QUIET_SECONDS = 4.0
"""How long memory is looked at while nothing is asked of the server: longer than it keeps the pages of a large body."""
DEATH_SECONDS = 2.0
TICK = 0.05
RIGHT = {"answered", "refused", "shed", "left"}
PROCESSES = ("api", "engine")


@dataclass
class Rest:
    """What a server holds while nothing is asked of it: gauges that must all be 0, resident bytes of its processes."""

    held: dict[str, float]
    memory: list[int]


@contextlib.contextmanager
def serving(artifact: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of ``artifact`` on a free port: its process and URL. Of its log all but the requests is shown."""
    command = [sys.executable, "-m", "llmopt.cli.main", "serve", str(artifact), "--port", "0", *flags]
    log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start (exit code {process.wait()})")
        yield process, line.split()[-1]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
        log.seek(0)
        sys.stderr.writelines(line for line in log if '"event": "request"' not in line)
        log.close()


async def within(seconds: float, done: Callable[[], bool]) -> bool:
    """Whether it is done in time, counted in ticks: while the machine does not let this process run, no time passes."""
    for _ in range(round(seconds / TICK)):
        if done():
            return True
        await asyncio.sleep(TICK)
    return done()


def engine_of(pid: int) -> int:
    """Process id of a server's engine process."""
    (child, *_) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


async def get(pool: HttpPool, path: str) -> tuple[int, str]:
    """Status and text."""
    parts: list[bytes] = []
    status = await pool.request("GET", path, b"", lambda data, at: parts.append(data))
    return status, b"".join(parts).decode()


async def run_clients(soak: Soak, clients: int, requests: float, seconds: float) -> list[Outcome]:
    """Outcomes of a mix of requests from ``clients`` at once, until ``requests`` or ``seconds`` are reached."""
    outcomes: list[Outcome] = []
    begun, end = 0, time.monotonic() + seconds
    kinds, shares = list(KINDS), list(KINDS.values())

    async def client() -> None:
        nonlocal begun
        while begun < requests and time.monotonic() < end:
            begun += 1
            outcomes.append(await one(soak, soak.rng.choices(kinds, shares)[0]))
            if begun % 1000 == 0:
                print(f"{begun} requests", file=sys.stderr)

    await asyncio.gather(*(client() for _ in range(clients)))
    assert len(outcomes) == begun, "a request without an outcome"
    return outcomes


async def rest(pool: HttpPool) -> dict[str, float]:
    """What the server still holds after it had 5 s to let go: gauges that must all be 0."""
    held: dict[str, float] = {}
    for _ in range(50):
        _, health = await get(pool, "/health")
        held = {"active_requests": json.loads(health)["active_requests"]}
        status, text = await get(pool, "/metrics")
        if status == 200:
            held |= gauges(text)
        if not any(held.values()):
            break
        await asyncio.sleep(0.1)
    return held


def gauges(text: str) -> dict[str, float]:
    """Sequences and blocks in use, from /metrics."""
    names = ("llmopt_requests_running", "llmopt_requests_waiting", "llmopt_kv_blocks_used")
    lines = [line.split() for line in text.splitlines() if line.startswith(names)]
    return {line[0]: float(line[1]) for line in lines}


async def kill_engine(soak: Soak, server: subprocess.Popen[str]) -> list[str]:
    """Kill the engine under 16 streams; returns what was wrong."""
    flights = [asyncio.create_task(one(soak, lambda s: streamed(s, max_tokens=s.context // 2))) for _ in range(16)]
    await asyncio.sleep(0.1)
    os.kill(engine_of(server.pid), signal.SIGKILL)
    await within(DEATH_SECONDS, lambda: all(task.done() for task in flights))
    late = [task for task in flights if not task.done()]
    problems = [f"{len(late)} requests did not hear of the engine's death in {DEATH_SECONDS} s"] if late else []
    for task in late:
        task.cancel()
    if not await within(20, lambda: server.poll() is not None) or not server.returncode:
        problems.append(f"the server's exit code was {server.returncode} after the engine died")
    return problems


async def at_rest(pool: HttpPool, pids: tuple[int, ...]) -> Rest:
    """What the server holds when nothing is asked of it. Memory is the least that was seen in QUIET_SECONDS."""
    held, memory = await rest(pool), []
    for _ in range(round(QUIET_SECONDS / TICK)):
        memory.append([resident(pid) for pid in pids])
        await asyncio.sleep(TICK)
    return Rest(held, [min(column) for column in zip(*memory)])


def course(values: Sequence[int], points: int = 12) -> list[int]:
    """Medians of equal parts of a run, in MB: whether memory climbs or has made one step."""
    return [round(float(np.median(part)) / 1e6) for part in np.array_split(values, min(points, len(values)))]


def judge(
    outcomes: list[Outcome], seen: Seen, warm: Rest, end: Rest, health_ms: float = 50.0, shared: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """(figures, what was wrong). ``shared``: others use this machine, so what a timer is late is added to the bound."""
    ends = Counter(o.ended for o in outcomes)
    problems = [f"{o.kind} {o.ended}: {o.detail}" for o in outcomes if o.ended not in RIGHT]
    p99 = float(np.percentile(seen.health, 99))
    growth = {name: last / first - 1 for name, first, last in zip(PROCESSES, warm.memory, end.memory)}
    problems += [f"/health answered {status}" for status in seen.statuses]
    lag = float(np.percentile(seen.lag, 99))
    if p99 > health_ms + lag * shared:
        problems.append(f"p99 of /health is {p99:.1f} ms, over {health_ms:g} (a timer here is {lag:.1f} ms late)")
    problems += [f"memory of the {n} process grew by {g:.1%}" for n, g in growth.items() if g > FLAT]
    problems += [f"{name} is {value:g} at the end" for name, value in end.held.items() if value]
    figures = {
        "requests": len(outcomes),
        "ends": dict(sorted(ends.items())),
        "kinds": dict(sorted(Counter(o.kind for o in outcomes).items())),
        "health_ms_p99": round(p99, 1),
        "timer_late_ms_p99": round(lag, 1),
        "memory_growth": {name: round(g, 4) for name, g in growth.items()},
        "memory_mb": {name: round(last / 1e6) for name, last in zip(PROCESSES, end.memory)},
        "memory_peak_mb": {name: round(max(values) / 1e6) for name, values in zip(PROCESSES, zip(*seen.memory))},
        "memory_course_mb": {name: course(values) for name, values in zip(PROCESSES, zip(*seen.memory))},
        "held": end.held,
    }
    return figures, problems


async def soak_server(
    url: str, server: subprocess.Popen[str], options: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """Run everything against a server that is up, one request of each kind first: no memory is new to it after that."""
    pool = HttpPool(parse_url(url), {"content-type": "application/json"})
    _, cards = await get(pool, "/v1/models")
    context = int(json.loads(cards)["data"][0]["max_model_len"])
    soak = Soak(pool, context, options.vocab_size, random.Random(options.seed))
    outcomes = [await one(soak, kind) for kind in (*KINDS, *map(refusal, REFUSALS))]
    pids = (server.pid, engine_of(server.pid))
    watcher = Watcher(pool.address.host, pool.address.port, pids)
    limit = options.minutes * 60
    first = await run_clients(soak, options.clients, options.requests * WARM, limit * WARM)
    warm = await at_rest(pool, pids)
    begun = time.monotonic()
    then = await run_clients(soak, options.clients, options.requests * (1 - WARM), limit * (1 - WARM))
    seconds = time.monotonic() - begun
    seen = watcher.stop()
    outcomes += [*first, *then]
    figures, problems = judge(
        outcomes, seen, warm, await at_rest(pool, pids), options.health_ms, options.shared_machine
    )
    figures |= {"requests_per_second": round(len(then) / seconds, 1), "clients": options.clients, "seed": options.seed}
    if options.kill_engine:
        problems += await kill_engine(soak, server)
    pool.close()
    await asyncio.sleep(0.05)
    return figures, problems


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code 1 when something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=float, default=float("inf"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=1000, help="prompt token ids are below this")
    parser.add_argument("--health-ms", type=float, default=50.0, help="bound on the p99 of /health")
    parser.add_argument("--shared-machine", action="store_true", help="add to that bound what a timer here is late")
    parser.add_argument("--kill-engine", action="store_true", help="kill the engine at the end")
    parser.add_argument("--append", type=Path, help="append the figures as a row to this JSONL file")
    parser.add_argument("--serve", default="", help="flags for llmopt serve")
    options = parser.parse_args(arguments)
    if options.requests == options.minutes == float("inf"):
        parser.error("give --requests or --minutes")
    with serving(options.artifact, *options.serve.split()) as (server, url):
        figures, problems = asyncio.run(soak_server(url, server, options))
    row = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": commit(), "machine": processor(), "cores": cores()}
    row |= {"load_average": round(os.getloadavg()[1], 1)}  # above the number of cores, others use this machine too
    row |= {"artifact": options.artifact.name, **figures, "problems": len(problems)}
    print(json.dumps(row, indent=2))
    for problem, count in Counter(problems).most_common(20):
        print(f"{count} x {problem}", file=sys.stderr)
    if options.append is not None:
        options.append.parent.mkdir(parents=True, exist_ok=True)
        with options.append.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
