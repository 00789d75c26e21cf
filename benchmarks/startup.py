"""Seconds from the start of a process to its first token: python benchmarks/startup.py measure ARTIFACT

Each repeat is a fresh process with torch and Triton hidden; the breakdown is its own clock's, the total the parent's.
``draw ARTIFACT OUT`` makes the artifact to measure out of one compiled with ``--weights random:SEED``: the seeded
weights are drawn, stored and digested, so that a start reads and checks every byte as with a trained model.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PROMPT_LEN = 128


def draw(source: Path, destination: Path) -> None:
    """Copy an artifact of seeded weights to one that holds them."""
    from llmopt.artifact import Artifact
    from llmopt.artifact.chunks import Chunks
    from llmopt.artifact.digest import CHUNK_BYTES, tree_digest
    from llmopt.artifact.manifest import WeightsEntry
    from llmopt.artifact.tensorfile import plan_layout
    from llmopt.program import TensorType

    artifact = Artifact.open(source)
    store = artifact.weight_store()
    types = {name: TensorType(w.type.shape, store.dtype(name)) for name, w in artifact.program.weights.items()}
    layout = plan_layout(types)
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns("weights.safetensors"))
    path = destination / "weights.safetensors"
    with path.open("wb") as file:
        file.truncate(layout.size)
        os.pwrite(file.fileno(), layout.header, 0)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: put(file.fileno(), store, name, layout.entries[name]), types))
    blank = WeightsEntry("embedded", layout.size, "", CHUNK_BYTES, ("",) * -(-layout.size // CHUNK_BYTES))
    digests = Chunks(path, blank, path.name).digests()
    entry = replace(blank, digest=tree_digest(digests), chunks=tuple(digests))
    manifest = replace(artifact.manifest, weights=entry)
    (destination / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def put(descriptor: int, store: Any, name: str, entry: Any) -> None:
    """Write a tensor at its place: a seeded one is its pool of values, repeated."""
    import numpy as np

    from llmopt.artifact.stores import draw_pool

    values = draw_pool(store.seed, name, store.tensors[name]) if name in store.tensors else store.get(name)
    data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    done = 0
    while done < entry.nbytes:
        start = done % len(data)
        whole = [data[start:], *[data] * 15]
        room = entry.nbytes - done
        done += os.pwritev(descriptor, whole if room >= 16 * len(data) else [data[start:][:room]], entry.offset + done)


def child(path: Path, device: str, started: float) -> None:
    """Load, generate one token, print the breakdown as JSON. ``started``: the parent's monotonic clock."""
    times = {"interpreter": time.monotonic() - started}
    for hidden in ("torch", "triton"):
        sys.modules[hidden] = None  # type: ignore[assignment]
    last = time.monotonic()

    def end(name: str) -> None:
        nonlocal last
        now = time.monotonic()
        times[name], last = now - last, now

    import llmopt.runtime.executors.cuda  # noqa: F401
    from llmopt.runtime.params import GenerationParams
    from llmopt.runtime.protocol import SamplingParams
    from llmopt.runtime.session import open_session
    from llmopt.target import LoadOptions

    end("import")
    stages: dict[str, float] = {}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stages.update(getattr(record, "stages", {}))
            print(record.getMessage(), file=sys.stderr)

    logger = logging.getLogger("llmopt.cuda")
    logger.setLevel("INFO")
    logger.addHandler(Keep())
    with open_session(path, LoadOptions(device, max_sequences=256)) as session:
        end("load")
        times["artifact"] = times.pop("load") - sum(stages.values())
        times |= stages
        limits = session.executor.limits
        prompt = [7 * i % limits.vocab_size for i in range(min(PROMPT_LEN, limits.max_context // 2))]
        params = GenerationParams(sampling=SamplingParams(temperature=0), max_tokens=1, ignore_eos=True)
        last = time.monotonic()
        session.engine.generate([prompt], params)
        end("first_token")
        print(json.dumps({k: round(v, 3) for k, v in times.items()}), flush=True)
        os._exit(0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row: the median start with its breakdown, and every total."""
    from llmopt.artifact import Artifact

    artifact = Artifact.open(options.artifact, verify=False)
    runs = []
    for _ in range(options.repeat):
        started = time.monotonic()
        command = [sys.executable, __file__, "child", str(options.artifact), options.device, str(started)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append((time.monotonic() - started, json.loads(done.stdout.splitlines()[-1])))
        print(f"{runs[-1][0]:.2f} s", runs[-1][1], flush=True)
    totals = [round(total, 3) for total, _ in runs]
    middle = sorted(runs, key=lambda run: run[0])[len(runs) // 2][1]
    return {
        "date": date.today().isoformat(),
        "commit": options.commit,
        "machine": options.machine,
        "cores": os.cpu_count(),
        "model": options.artifact.name,
        "dtype": artifact.manifest.dtype,
        "weights_bytes": artifact.manifest.weights.bytes,
        "start_s": statistics.median(totals),
        "starts_s": totals,
        "stages_s": middle,
    }


def packages() -> dict[str, Any]:
    """Bytes that ``pip install 'llmopt[cuda]'`` puts beside llmopt, by package."""
    from importlib import metadata

    pending, found = ["llmopt"], {}
    while pending:
        name = pending.pop()
        for line in metadata.requires(name) or ():
            wanted, _, marker = line.partition(";")
            base = "".join(c if c.isalnum() or c in "-_." else " " for c in wanted).split()[0].lower().replace("_", "-")
            if base in found or ("extra" in marker and not (name == "llmopt" and "'cuda'" in marker)):
                continue
            try:
                files = metadata.files(base) or []
            except metadata.PackageNotFoundError:
                continue  # for another platform or Python
            found[base] = sum(p.stat().st_size for f in files if (p := Path(str(f.locate()))).is_file())
            pending.append(base)
    return {"bytes": sum(found.values()), "packages": dict(sorted(found.items(), key=lambda item: -item[1]))}


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("draw")
    making.add_argument("artifact", type=Path)
    making.add_argument("out", type=Path)
    inner = commands.add_parser("child")
    inner.add_argument("artifact", type=Path)
    inner.add_argument("device")
    inner.add_argument("started", type=float)
    outer = commands.add_parser("measure")
    outer.add_argument("artifact", type=Path)
    outer.add_argument("--device", default="cuda")
    outer.add_argument("--repeat", type=int, default=3)
    outer.add_argument("--machine", default="NVIDIA H200")
    outer.add_argument("--commit", default="")
    outer.add_argument("--append", type=Path, default=Path("benchmarks/rows/startup/h200.jsonl"))
    commands.add_parser("packages")
    options = parser.parse_args()
    match options.command:
        case "draw":
            draw(options.artifact, options.out)
        case "child":
            child(options.artifact, options.device, options.started)
        case "packages":
            print(json.dumps(packages(), indent=1))
        case "measure":
            row = measure(options)
            options.append.parent.mkdir(parents=True, exist_ok=True)
            with options.append.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()
