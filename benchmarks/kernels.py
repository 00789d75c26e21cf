"""Times the cuda target's kernels on a GPU, the very cubins that ship.

    python benchmarks/kernels.py build DIR [--only TEXT]   # anywhere with triton; no GPU
    python benchmarks/kernels.py time DIR --rows FILE      # on the GPU machine: cuda-core and numpy only
    python benchmarks/kernels.py tune FILE                 # the best configuration of each shape → targets/cuda/tuning

A measurement is a CUDA graph of launches whose large operand moves through a pool larger than the L2, replayed.
Results are checked against float64 on a sample of the outputs; a wrong kernel's row says so and is never tuned to.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

POOL = 3 << 30
REPLAYS = 9


def build(folder: Path, only: str) -> None:
    """Compile every case's kernels and describe how to launch them."""
    from benchmarks.kernel_cases import cases
    from llmopt.launch import Bucket, Launch, View
    from llmopt.program import dtype_bytes
    from targets.cuda.build import with_maps
    from targets.cuda.cache import CubinCache, Job
    from targets.cuda.compile import compile_all, compiler_version
    from targets.cuda.kernel import Scratch, Strided
    from targets.cuda.plan import operand, scratch_name

    version = compiler_version()
    found = [case for case in cases() if re.search(only, f"{case.kernel} {case.model} {case.what} {case.key}")]
    jobs = {x.specialization: Job(x.specialization, 90, version) for c in found for x in c.selection.launches}
    last = [0.0]

    def progress(what: str, done: int, total: int) -> None:
        if done == total or done - last[0] >= 20:
            last[0] = done
            print(f"{what}: {done} of {total}", flush=True)

    compiled = compile_all(jobs.values(), CubinCache(), progress)
    (folder / "cubins").mkdir(parents=True, exist_ok=True)
    entries, cubins = [], {}
    for case in found:
        buffers: dict[str, dict[str, Any]] = {}
        launches = []
        for one in case.selection.launches:
            job = jobs[one.specialization]
            name = f"{one.specialization.function}_{job.identity()[:16]}"
            kernel = compiled[job]
            (folder / "cubins" / f"{name}.cubin").write_bytes(kernel.cubin)
            cubins[name] = {
                "file": f"cubins/{name}.cubin", "symbol": kernel.symbol, "threads": kernel.threads,
                "shared": kernel.shared, "registers": kernel.registers, "spills": kernel.spills,
            }  # fmt: skip
            types = one.specialization.signature
            args = tuple(operand(arg, type_, case.selection_call) for (_, type_), arg in zip(types, one.args))
            launch = Launch(name, one.grid, args, one.specialization.pdl, one.bytes)
            maps = {name: kernel.tensor_maps}
            bucket = Bucket("decode", {}, {}, (launch,), (), {}, 0, View("", "", (), ()), View("", "", (), ()))
            launches.append(with_maps(bucket, maps).launches[0])
            for arg in one.args:
                if isinstance(arg, Scratch):
                    buffers[scratch_name(case.selection_call, arg)] = {"bytes": arg.bytes, "kind": "zero"}
        tensors = [v for v in case.values.values() if isinstance(v, Strided)]
        for x in [*tensors, *case.outputs]:
            size = max(dtype_bytes(x.dtype) * (1 + x.offset + sum((n - 1) * s for n, s in zip(x.shape, x.strides))), 16)
            kind = "data" if x.buffer in case.data else "pool" if x.buffer in case.rotating else "random"
            old = buffers.get(x.buffer, {"bytes": 0})
            if old["bytes"] < size:
                buffers[x.buffer] = {"bytes": size, "kind": kind, "dtype": x.dtype, "data": case.data.get(x.buffer)}
        entry = {
            "model": case.model, "what": case.what, "kernel": case.kernel, "key": case.key, "config": case.config,
            "bytes": case.bytes, "flops": case.flops, "buffers": buffers, "reason": case.selection.reason,
            "launches": [{**asdict(x), "args": [[type(a).__name__, asdict(a)] for a in x.args]} for x in launches],
        }  # fmt: skip
        entries.append(entry)
    manifest = {"triton": version, "cubins": cubins, "entries": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    print(f"{len(entries)} cases, {len(cubins)} cubins")


class Gpu:
    """One GPU: a pool of random bfloat16 to rotate through, and room for everything else."""

    def __init__(self, device: str) -> None:
        from llmopt.runtime.executors.cuda.driver import call, open_device

        self.call, self.device = call, open_device(device)
        self.stream = call("cuStreamCreate", 0)
        self.pool, self.work = call("cuMemAlloc", POOL), call("cuMemAlloc", 2 << 30)
        random = np.random.default_rng(0)
        chunk = bfloat16(random.standard_normal(1 << 24, np.float32) * 0.05)
        for at in range(0, POOL, chunk.nbytes):
            call("cuMemcpyHtoD", int(self.pool) + at, chunk.ctypes.data, chunk.nbytes)
        self.chunk = chunk

    def place(self, entry: dict[str, Any]) -> dict[str, int]:
        """Addresses of the buffers that do not rotate, filled."""
        found, at = {}, int(self.work)
        for name, buffer in entry["buffers"].items():
            if buffer["kind"] == "pool":
                continue
            found[name] = at
            if buffer["kind"] == "zero":
                self.call("cuMemsetD8", at, 0, buffer["bytes"])
            elif buffer["kind"] == "data":
                data = np.array(buffer["data"], buffer["dtype"])
                self.call("cuMemcpyHtoD", at, data.ctypes.data, data.nbytes)
            elif buffer["dtype"] == "bfloat16":
                for start in range(0, buffer["bytes"], self.chunk.nbytes):
                    size = min(self.chunk.nbytes, buffer["bytes"] - start)
                    self.call("cuMemcpyHtoD", at + start, self.chunk.ctypes.data, size)
            at += -(-buffer["bytes"] // 1024) * 1024
        return found

    def read(self, at: int, count: int, dtype: str = "bfloat16") -> Any:
        """Numbers at an address, as float64."""
        raw = np.empty(count, np.uint16 if dtype == "bfloat16" else dtype)
        self.call("cuMemcpyDtoH", raw.ctypes.data, at, raw.nbytes)
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if dtype == "bfloat16" else raw


def bfloat16(x: Any) -> Any:
    """float32 as the upper halves of its bits, rounded to nearest."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def time_entry(gpu: Gpu, kernels: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """Median and spread of a launch in microseconds, and the worst error of a sample of its outputs."""
    from cuda.bindings import driver as cu

    from llmopt.launch import Launch, Pointer, Scalar, TensorMap
    from llmopt.runtime.executors.cuda.launches import BoundLaunch

    kinds = {"Pointer": Pointer, "Scalar": Scalar, "TensorMap": TensorMap}
    fixed = gpu.place(entry)
    pooled = {n: -(-b["bytes"] // 1024) * 1024 for n, b in entry["buffers"].items() if b["kind"] == "pool"}
    span = sum(pooled.values())
    estimate = max(entry["bytes"] / 4.0e6, entry["flops"] / 6e8, 2.0)
    count = int(min(max(3000 / estimate, 4), 400))
    bound, address = [], dict(fixed)
    for i in range(count):
        base = int(gpu.pool) + (i * span % (POOL - span) if span else 0)
        base = -(-base // 1024) * 1024
        for name, size in pooled.items():
            address[name], base = base, base + size
        for raw in entry["launches"]:
            args = tuple(
                kinds[k](**{n: tuple(v) if isinstance(v, list) else v for n, v in a.items()}) for k, a in raw["args"]
            )
            launch = Launch(**{**raw, "grid": tuple(raw["grid"]), "args": args})
            cubin = kernels.cubins[launch.kernel]
            bound.append(BoundLaunch(launch, cubin, kernels.get(launch.kernel), address.__getitem__, gpu.stream))
    call = gpu.call
    call("cuStreamBeginCapture", gpu.stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
    for launch in bound:
        launch()
    graph = call("cuStreamEndCapture", gpu.stream)
    ready = call("cuGraphInstantiate", graph, 0)
    start, stop = call("cuEventCreate", 0), call("cuEventCreate", 0)
    times = []
    for _ in range(REPLAYS + 2):
        call("cuEventRecord", start, gpu.stream)
        call("cuGraphLaunch", ready, gpu.stream)
        call("cuEventRecord", stop, gpu.stream)
        call("cuStreamSynchronize", gpu.stream)
        times.append(call("cuEventElapsedTime", start, stop) * 1000 / count)
    call("cuGraphExecDestroy", ready)
    call("cuGraphDestroy", graph)
    low, median, high = np.percentile(times[2:], [20, 50, 80])
    error = check(gpu, entry, address)
    return {"us": round(float(median), 3), "p20": round(float(low), 3), "p80": round(float(high), 3), "error": error}


def check(gpu: Gpu, entry: dict[str, Any], address: dict[str, int]) -> float | None:
    """Largest error relative to the largest value, over a sample, of the last launch; None where nothing is checked."""
    random = np.random.default_rng(1)
    if entry["kernel"].startswith("gem"):
        m, n, k = map(int, entry["key"].split()[1].split("x"))
        rows, columns = np.unique(random.integers(0, m, 8)), np.unique([*random.integers(0, n, 40), 0, n - 1])
        x = np.stack([gpu.read(address["x"] + 2 * k * int(r), k) for r in rows])
        w = np.stack([gpu.read(address["weight"] + 2 * k * int(c), k) for c in columns])
        found = np.stack([gpu.read(address["out"] + 2 * n * int(r), n)[columns] for r in rows])
        expected = x @ w.T
    elif entry["kernel"] == "attention":
        found, expected = attention_sample(gpu, entry, address, random)
    else:
        return None
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return round(error, 6) if error == error else float("inf")


def attention_sample(gpu: Gpu, entry: dict[str, Any], address: dict[str, int], random: Any) -> tuple[Any, Any]:
    """Outputs of some rows and heads of the 8B shape, and what they should be."""
    heads, shared, d, size = 32, 8, 128, entry["config"]["size"]
    function, extents = entry["key"].split()[1:3]
    rows = int(extents.partition("x")[0])
    data = {name: entry["buffers"][name]["data"] for name in ("table", "lens", "cu")}
    found, expected = [], []
    for _ in range(6):
        row, head = int(random.integers(0, rows)), int(random.integers(0, heads))
        sequence = row if function == "decode" else 0
        length = data["lens"][sequence]
        position = length - data["cu"][sequence + 1] + row
        pages = data["table"][sequence * (8192 // size) :][: -(-length // size)]
        span = size * d

        offsets = [2 * span * (p * shared + head // (heads // shared)) for p in pages]
        k, v = (
            np.concatenate([gpu.read(address[name] + at, span).reshape(size, d) for at in offsets])[: position + 1]
            for name in ("k", "v")
        )
        q = gpu.read(address["q"] + 2 * d * (head * rows + row), d)
        score = k @ q * d**-0.5
        p = np.exp(score - score.max())
        expected.append((p / p.sum()) @ v)
        found.append(gpu.read(address["out"] + 2 * d * (row * heads + head), d))
    return np.stack(found), np.stack(expected)


def measure(folder: Path, rows_file: Path, device: str, only: str) -> None:
    """Time every entry and append its row."""
    from llmopt.launch import Cubin
    from llmopt.runtime.executors.cuda.launches import Kernels

    manifest = json.loads((folder / "manifest.json").read_text())
    gpu = Gpu(device)
    cubins = {name: Cubin(**raw) for name, raw in manifest["cubins"].items()}
    kernels = Kernels(cubins, lambda name: (folder / name).read_bytes())
    hardware = {"gpu": gpu.device.name, "driver": gpu.device.driver, "triton": manifest["triton"],
                "date": datetime.date.today().isoformat()}  # fmt: skip
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    with rows_file.open("a") as out:
        for entry in manifest["entries"]:
            if only not in f"{entry['kernel']} {entry['what']} {entry['key']}":
                continue
            try:
                timed = time_entry(gpu, kernels, entry)
            except Exception as error:
                print(f"{entry['kernel']} {entry['key']} {entry['config']}: {error}", flush=True)
                if "dead" in str(error):
                    raise
                continue
            names = ("model", "what", "kernel", "key", "config", "bytes", "flops")
            row = {**hardware, **{n: entry[n] for n in names}, **timed}
            row["gbps"] = round(entry["bytes"] / timed["us"] / 1000, 1)
            row["tflops"] = round(entry["flops"] / timed["us"] / 1e6, 1)
            cubin = cubins[entry["launches"][0]["kernel"]]
            row |= {"registers": cubin.registers, "shared": cubin.shared, "spills": cubin.spills}
            out.write(json.dumps(row) + "\n")
            out.flush()
    summarize(rows_file)


def best(rows_file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The fastest right row of each (kernel, key)."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in rows_file.read_text().splitlines():
        row = json.loads(line)
        right = row["error"] is None or row["error"] < 0.02
        at = (row["kernel"], f"{row['model']} {row['what']} {row['key']}")
        if right and (at not in found or row["us"] < found[at]["us"]):
            found[at] = row
    return found


def summarize(rows_file: Path) -> None:
    """One line a shape: the best configuration."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    wrong = [r for r in rows if r["error"] is not None and not r["error"] < 0.02]
    for row in best(rows_file).values():
        short = " ".join(f"{k}={v}" for k, v in row["config"].items())
        print(f"{row['kernel'][:15]:15} {row['what'][:14]:14} {row['key'][9:]:22} {row['us']:9.2f} us "
              f"{row['gbps']:7.0f} GB/s {row['tflops']:6.0f} TF {short}")  # fmt: skip
    print(
        f"{len(rows)} rows, {len(wrong)} wrong", *[(r["kernel"], r["key"], r["config"], r["error"]) for r in wrong[:6]]
    )


def tune(rows_file: Path, target: Path) -> None:
    """Write the best configurations, by kernel and key."""
    table: dict[str, Any] = {}
    for (kernel, _), row in sorted(best(rows_file).items()):
        old = table.setdefault(kernel, {}).get(row["key"])
        if kernel.startswith("gem") and (old is None or row["us"] < old["us"]):
            table[kernel][row["key"]] = {**row["config"], "us": row["us"]}
    triton = {json.loads(line)["triton"] for line in rows_file.read_text().splitlines()}
    text = {"triton": sorted(triton), "kernels": {k: v for k, v in table.items() if v}}
    target.write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["build", "time", "tune", "show"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/rows/kernels/h200.jsonl"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if args.command == "build":
        build(args.path, args.only)
    elif args.command == "time":
        measure(args.path, args.rows, args.device, args.only)
    elif args.command == "tune":
        tune(args.path, Path(__file__).resolve().parents[1] / "targets/cuda/tuning/sm_90.json")
    else:
        summarize(args.path)


if __name__ == "__main__":
    main()
