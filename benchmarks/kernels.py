"""Times the cuda target's kernels on a GPU, the very cubins that ship: what ``llmopt tune`` does, for fixed shapes.

python benchmarks/kernels.py build DIR [--only REGEX]  # anywhere with triton; no GPU
python benchmarks/kernels.py time DIR --rows FILE      # on the GPU machine: cuda-bindings and numpy only
python benchmarks/kernels.py table FILE                # the best configuration of each shape → targets/cuda/tuning
python benchmarks/kernels.py show FILE
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from targets.cuda.tuning.timing import WRONG


def progress(what: str, done: int, total: int) -> None:
    """A line now and then."""
    if done == total or done % 50 == 0:
        print(f"{what}: {done} of {total}", flush=True)


def build(folder: Path, only: str) -> None:
    """Compile every case's kernels and describe how to launch them."""
    from benchmarks.kernel_cases import cases
    from targets.cuda.tuning.build import build_bundle

    found = [case for case in cases() if re.search(only, f"{case.kernel} {case.model} {case.what} {case.key}")]
    bundle = build_bundle(folder, found, 90, progress)
    print(f"{len(bundle.entries)} cases, {len(bundle.cubins)} cubins")


def measure(folder: Path, rows_file: Path, device: str) -> None:
    """Time every entry and append its row."""
    from targets.cuda.tuning.bundle import open_bundle
    from targets.cuda.tuning.timing import row_fields, time_bundle

    rows, failed, machine = time_bundle(open_bundle(folder), device, progress)
    machine["date"] = datetime.date.today().isoformat()
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    with rows_file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row_fields(row, machine)) + "\n" for row in rows)
    print(*failed, sep="\n")
    show(rows_file)


def best(rows_file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The fastest right row of each (kernel, call)."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in rows_file.read_text().splitlines():
        row = json.loads(line)
        right = row["error"] is None or row["error"] < WRONG
        at = (row["kernel"], f"{row['model']} {row['what']} {row['key']}")
        if right and (at not in found or row["us"] < found[at]["us"]):
            found[at] = row
    return found


def show(rows_file: Path) -> None:
    """One line a shape: the best configuration; then what was wrong."""
    for row in best(rows_file).values():
        short = " ".join(f"{k}={v}" for k, v in row["config"].items())
        print(f"{row['kernel'][:15]:15} {row['what'][-18:]:18} {row['key'][9:]:28} {row['us']:9.2f} us "
              f"{row['gbps']:7.0f} GB/s {row['tflops']:6.0f} TF {short}")  # fmt: skip
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    wrong = [r for r in rows if r["error"] is not None and not r["error"] < WRONG]
    print(f"{len(rows)} rows, {len(wrong)} wrong")
    for row in wrong[:6]:
        print(row["kernel"], row["key"], row["config"], row["error"])


def tabulate(rows_file: Path) -> None:
    """Put the best configurations into the built-in table."""
    from targets.cuda.tuning.table import builtin, write

    found: dict[str, dict[str, dict[str, Any]]] = {}
    compilers = set()
    for (kernel, _), row in best(rows_file).items():
        compilers.add(row["compiler"])
        old = found.setdefault(kernel, {}).get(row["key"])
        if row["config"] and (old is None or row["us"] < old["us"]):
            found[kernel][row["key"]] = {**row["config"], "us": row["us"]}
    if len(compilers) != 1:
        raise SystemExit(f"rows of several compilers: {', '.join(sorted(compilers))}")
    write(builtin(90), 90, compilers.pop(), {kernel: entries for kernel, entries in found.items() if entries})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["build", "time", "table", "show"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/rows/kernels/h200.jsonl"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="a regular expression over kernel, model, layer and shape")
    args = parser.parse_args()
    if args.command == "build":
        build(args.path, args.only)
    elif args.command == "time":
        measure(args.path, args.rows, args.device)
    elif args.command == "table":
        tabulate(args.path)
    else:
        show(args.path)


if __name__ == "__main__":
    main()
