"""Checks and times drawing on a GPU with a vocabulary of 128256, through the executor and the cubins that ship.

python benchmarks/sampling.py build DIR   # anywhere with triton: plan, cubins, the tokens the host sampler draws
python benchmarks/sampling.py time DIR    # on the GPU machine: cuda-bindings and numpy only; appends rows

The model is a table: a row's logits are those of its position, so that the host knows them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmopt.program import Function, OpCall, Program, Ref, StatePlan, TensorType, WeightType
from llmopt.runtime.protocol import Admission, Sampled, SamplingParams, SeqStep, StepBatch

V, POSITIONS, STEPS, REPEATS = 128256, 24, 12, 4
BATCHES = (1, 64, 256)
WORDS = -(-V // 32)
HEAVY = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9, "temperature": 0.8},
    "top-p 0.95": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "penalties": {"temperature": 0.0, **HEAVY},
    "penalties, top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9, **HEAVY},
    "300 biases": {"temperature": 0.0, "logit_bias": {7 * i * i % V: (-1.0) ** i * 8 for i in range(1, 301)}},
    "mask": {"temperature": 0.7, "mask": True},
    "mask, top-k 50": {"top_k": 50, "mask": True},
    "20 log-probabilities": {"temperature": 0.0, "logprobs": 20},
}


def table() -> npt.NDArray[np.uint16]:
    """Logits (POSITIONS, V) as bf16 bits: flat and steep ones in turn, with some that stand out."""
    random = np.random.default_rng(0)
    x = random.standard_normal((POSITIONS, V), np.float32) * np.array([0.5, 1, 2, 4] * (POSITIONS // 4))[:, None]
    x[:, random.integers(0, V, 40)] += 6
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def logits_at(bits: npt.NDArray[np.uint16], position: int) -> npt.NDArray[np.float32]:
    """A row of the table."""
    return (bits[position].astype(np.uint32) << 16).view(np.float32)


def params(kind: str, seed: int) -> SamplingParams:
    """Sampling parameters of a kind."""
    return SamplingParams(seed=seed, **{k: v for k, v in KINDS[kind].items() if k != "mask"})


def mask(seq_id: int, position: int) -> npt.NDArray[np.uint32]:
    """Half of the vocabulary."""
    return np.random.default_rng([seq_id, position]).integers(0, 2**32, WORDS, np.uint32)


def sequences() -> list[tuple[str, Admission]]:
    """Every kind several times, with prompts of 1 to 8 tokens."""
    random = np.random.default_rng(1)
    kinds = list(KINDS) * REPEATS
    prompts = [random.integers(0, V, 1 + i % 8).astype(np.int64) for i in range(len(kinds))]
    return [(k, Admission(i, p, params(k, 2**40 * i + 5))) for i, (k, p) in enumerate(zip(kinds, prompts))]


def expected() -> tuple[list[list[int]], list[list[float]]]:
    """Tokens (sequences, STEPS) that the host sampler draws, and how far each draw was from another outcome."""
    from llmopt.runtime.sampler import HostSampler

    bits, tokens, firsts = table(), [], []
    for kind, admission in sequences():
        sampler, drawn = HostSampler(V), []
        sampler.admit(admission)
        for step in range(STEPS):
            at = len(admission.prompt) - 1 + step
            masks = {admission.seq_id: mask(admission.seq_id, at)} if "mask" in KINDS[kind] else None
            drawn += sampler.sample_rows([admission.seq_id], logits_at(bits, at)[None], masks)
        tokens.append([s.token for s in drawn])
        firsts.append([s.logprob or 0.0 for s in drawn])
    return tokens, firsts


def program() -> Program:
    """Logits by position, in both functions."""
    types = {
        "input_ids": TensorType((1, "T"), "int64"), "position_ids": TensorType((1, "T"), "int64"),
        "logit_rows": TensorType(("M",), "int64"), "rows": TensorType((1, "T", V), "bfloat16"),
        "logits": TensorType((1, "M", V), "bfloat16"),
    }  # fmt: skip
    calls = (
        OpCall("aten.embedding.default", {"weight": Ref("table"), "indices": Ref("position_ids")}, ("rows",)),
        OpCall("aten.index_select.default", {"self": Ref("rows"), "dim": 1, "index": Ref("logit_rows")}, ("logits",)),
    )
    inputs = ("input_ids", "position_ids", "logit_rows")
    functions = {name: Function(name, inputs, calls, ("logits",), types) for name in ("decode", "extend")}
    weights = {"table": WeightType(TensorType((POSITIONS, V), "bfloat16"))}
    dims = dict.fromkeys("TNM", (1, 2048))
    return Program(functions, {n: n for n in functions}, weights, StatePlan(()), dims, POSITIONS, V)


def build(folder: Path) -> None:
    """The launch plan, its cubins, and what is to be drawn."""
    from llmopt.target import BuildContext
    from targets.cuda.build import build as build_files
    from targets.cuda.cache import CubinCache
    from targets.cuda.options import CudaOptions

    options = CudaOptions(decode_buckets=BATCHES, extend_buckets=(2048,), extend_sequences=(max(BATCHES),))
    made = build_files(program(), {"table": None}, options, BuildContext({}), CubinCache())  # type: ignore[dict-item]
    for name, data in made.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    tokens, logprobs = expected()
    (folder / "expected.json").write_text(json.dumps({"tokens": tokens, "logprobs": logprobs, **made.notes}))
    print(f"{len(made.files)} files, {sum(map(len, tokens))} draws")


def open_executor(folder: Path) -> Any:
    """The executor over the GPU, with the table in its memory."""
    from llmopt.launch import LaunchPlan
    from llmopt.runtime.executors.cuda.driver import call, open_device
    from llmopt.runtime.executors.cuda.executor import CudaExecutor
    from llmopt.runtime.executors.cuda.gpu import GpuBackend, layout
    from llmopt.runtime.executors.cuda.layout import weights_region

    plan = LaunchPlan.from_json((folder / "launch/sm_90.json").read_text())
    where = layout(plan, weights_region(program()))
    backend = GpuBackend(program(), plan, open_device("cuda"), where, {}, lambda name: (folder / name).read_bytes())
    bits = table()
    call("cuMemcpyHtoD", backend.weights, bits.ctypes.data, bits.nbytes)
    executor = CudaExecutor(program(), plan, backend, max(BATCHES), POSITIONS)
    start = time.perf_counter()
    backend.capture(executor.buckets.decode)
    print(f"{len(BATCHES)} buckets captured in {time.perf_counter() - start:.3f} s; persistent "
          f"{where.persistent.size / 1e6:.1f} MB, arena {where.arena_bytes / 1e6:.1f} MB")  # fmt: skip
    return executor


def step_of(admissions: list[Admission], step: int, masked: set[int]) -> StepBatch:
    """A step of sequences that are in step with each other."""
    rows = []
    for a in admissions:
        tokens, start = (None, len(a.prompt) + step - 1) if step else (a.prompt, 0)
        rows.append(SeqStep(a.seq_id, tokens, start, {}, sample=True))
    masks = {a.seq_id: mask(a.seq_id, len(a.prompt) - 1 + step) for a in admissions if a.seq_id in masked}
    return StepBatch(tuple(rows), admit=() if step else tuple(admissions), masks=masks)


def check(executor: Any, folder: Path) -> dict[str, Any]:
    """Draws that differ from the host's, the host one step ahead."""
    wanted = json.loads((folder / "expected.json").read_text())
    admissions = [a for _, a in sequences()]
    masked = {a.seq_id for kind, a in sequences() if "mask" in KINDS[kind]}
    drawn: list[dict[int, Sampled]] = []
    tickets = [executor.submit(step_of(admissions, 0, masked))]
    for step in range(STEPS):
        if step + 1 < STEPS:
            tickets.append(executor.submit(step_of(admissions, step + 1, masked)))
        drawn.append(executor.collect(tickets[step]).sampled)
    executor.collect(executor.submit(StepBatch((), release=tuple(a.seq_id for a in admissions))))
    wrong, error = [], 0.0
    for (kind, a), tokens, logprobs in zip(sequences(), wanted["tokens"], wanted["logprobs"]):
        found = [step[a.seq_id] for step in drawn]
        wrong += [(kind, a.seq_id, i, s.token, t) for i, (s, t) in enumerate(zip(found, tokens)) if s.token != t]
        if a.sampling.logprobs is not None:
            error = max(error, *(abs((s.logprob or 0) - p) for s, p in zip(found, logprobs)))
    print(f"{len(wrong)} of {len(admissions) * STEPS} draws differ, log-probabilities by {error:.2g}", *wrong[:20])
    return {"draws": len(admissions) * STEPS, "different": len(wrong), "logprob_error": error}


def graph_us(launches: Any, stream: Any, repeat: int = 21) -> list[float]:
    """Device microseconds of each of some runs."""
    from llmopt.runtime.executors.cuda.driver import call

    events = [call("cuEventCreate", 0) for _ in range(repeat + 1)]
    call("cuEventRecord", events[0], stream)
    for event in events[1:]:
        launches.run()
        call("cuEventRecord", event, stream)
    call("cuEventSynchronize", events[-1])
    return [call("cuEventElapsedTime", a, b) * 1e3 for a, b in pairwise(events)][1:]


def alone_us(bound: Any, index: int, backend: Any, copies: int = 20) -> float:
    """Median microseconds of one launch of the sampling graph, from a graph of copies of it."""
    from llmopt.runtime.executors.cuda.launches import BoundLaunches

    many = BoundLaunches((), backend.kernels, lambda name: 0, backend.stream)
    many.launches = [bound.sampling.launches[index]] * copies
    many.capture()
    us = float(np.median(graph_us(many, backend.stream, 6))) / copies
    many.close()
    return us


def measure(executor: Any, kind: str, batch: int, steep: bool) -> dict[str, Any]:
    """A row: the sampling graph of a batch of one kind, at a flat or a steep distribution."""
    length = 7 if steep else 8  # the row drawn from by the first decode step
    prompt = np.arange(length, dtype=np.int64)
    admissions = [Admission(i, prompt, params(kind, i)) for i in range(batch)]
    masked = set(range(batch)) if "mask" in KINDS[kind] else set()
    for step in range(2):
        executor.collect(executor.submit(step_of(admissions, step, masked)))
    backend = executor.backend
    bound = backend.bound[executor.buckets.pick("decode", batch, batch)]
    part = bound.greedy if kind == "greedy" else bound.sampling
    p20, median, p80 = np.percentile(graph_us(part, backend.stream), (20, 50, 80)).round(2).tolist()
    names = [launch.kernel.rpartition("_")[0] for launch in bound.bucket.sampling]
    each = {} if kind == "greedy" else {n: round(alone_us(bound, i, backend), 2) for i, n in enumerate(names)}
    executor.collect(executor.submit(StepBatch((), release=tuple(range(batch)))))
    floor = 2 * batch * V / 4.39e6
    return {"kind": kind, "batch": batch, "distribution": "steep" if steep else "flat", "us": median, "us_p20": p20,
            "us_p80": p80, "floor_us": round(floor, 2), "launches_us": each}  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["build", "time"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/rows/sampling/h200.jsonl"))
    options = parser.parse_args()
    if options.command == "build":
        build(options.folder)
        return
    executor = open_executor(options.folder)
    device = executor.backend.device
    common = {"date": date.today().isoformat(), "commit": options.commit, "machine": device.name, "vocab": V}
    rows = [{**common, "kind": "check", **check(executor, options.folder)}]
    for kind in KINDS:
        for batch in BATCHES:
            for steep in (True, False) if kind in ("top-k 50", "top-p 0.95", "min-p 0.05") else (True,):
                rows.append({**common, **measure(executor, kind, batch, steep)})
                print({k: v for k, v in rows[-1].items() if k not in common}, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    executor.close()


if __name__ == "__main__":
    main()
