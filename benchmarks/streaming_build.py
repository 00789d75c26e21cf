"""Time and peak anonymous memory of a build: python benchmarks/streaming_build.py --like llama-3.1-8b -r int4-cpu

Makes a random checkpoint with ``llmopt make-checkpoint``, compiles it with ``llmopt compile`` in a child process,
samples the child's RssAnon in /proc, prints one JSON row and appends it to benchmarks/builds.jsonl. Fails when the peak
exceeds ``--limit`` bytes. Linux only; needs free disk for the checkpoint and the artifact.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

PERIOD_S = 0.02
ROWS = Path(__file__).resolve().parent / "builds.jsonl"


@dataclass(frozen=True)
class Watched:
    """A child's run: seconds, peak anonymous and peak resident bytes (file pages included)."""

    seconds: float
    peak_anon: int
    peak_rss: int


def status(pid: int) -> dict[str, int]:
    """Memory fields of /proc/<pid>/status in bytes; empty once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.endswith("kB"))
    return {key.rstrip(":"): int(value) * 1024 for key, value, _ in pairs}


def watch(command: list[str]) -> Watched:
    """Run a command, sampling its memory. Raises CalledProcessError when it fails."""
    start, anon, rss = time.perf_counter(), 0, 0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        fields = status(child.pid)
        anon, rss = max(anon, fields.get("RssAnon", 0)), max(rss, fields.get("VmHWM", 0))
        time.sleep(PERIOD_S)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return Watched(round(time.perf_counter() - start, 1), anon, rss)


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def machine() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    """Returns 1 when the peak exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("-r", "--recipe", default="int4-cpu")
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--limit", type=float, default=4e9, help="bytes of anonymous memory (default 4e9)")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoint and artifact (default: a temporary one)")
    parser.add_argument("--checkpoint", type=Path, help="build this checkpoint instead of making one")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder")
    options = parser.parse_args()
    llmopt = [sys.executable, "-m", "llmopt.cli.main"] if shutil.which("llmopt") is None else ["llmopt"]
    scratch = Path(tempfile.mkdtemp(prefix="llmopt-build-", dir=options.scratch))
    try:
        checkpoint, made = options.checkpoint or scratch / "checkpoint", None
        if options.checkpoint is None:
            layers = ["--layers", str(options.layers)] if options.layers else []
            made = watch([*llmopt, "make-checkpoint", str(checkpoint), "--like", options.like, *layers, "--json"])
        context = ["--max-context", str(options.max_context)]
        artifact = scratch / "artifact"
        arguments = [str(checkpoint), "-r", options.recipe, "-o", str(artifact), *context, "--json"]
        build = watch([*llmopt, "compile", *arguments])
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        row = {
            "date": date.today().isoformat(),
            "commit": commit.stdout.strip(),
            "machine": machine(),
            "cores": os.cpu_count(),
            "model": options.like,
            "layers": options.layers,
            "recipe": options.recipe,
            "checkpoint_bytes": size(checkpoint),
            "artifact_bytes": size(artifact),
            "make": asdict(made) if made else None,
            "build": asdict(build),
            "stages": json.loads(artifact.with_name("artifact.build.json").read_text())["seconds"],
        }
    finally:
        if not options.keep:
            shutil.rmtree(scratch)
    print(json.dumps(row, indent=1))
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return int(build.peak_anon > options.limit)


if __name__ == "__main__":
    sys.exit(main())
