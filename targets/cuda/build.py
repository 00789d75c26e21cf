"""Builds the files of a cuda artifact: buckets planned, kernels compiled, a launch plan for each architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmopt.launch import Bucket, Cubin, Launch, LaunchPlan, TensorMap, View, plan_file
from llmopt.program import Function, Program, TensorType, eval_shape
from llmopt.target import BuildContext, TargetFiles, WeightReader

from .cache import Compiled, CubinCache, Job
from .chain import CHAIN
from .compile import compile_all, compiler_version, toolkit_major
from .feedback import KEPT, with_feedback
from .kernel import Kernel, Specialization
from .options import CudaOptions
from .pack import packed, stored
from .plan import BucketPlan, dense, place, plan_bucket, view
from .proven import proven
from .select import Selector, discover
from .tuning import Table
from .tuning.crossover import crossovers
from .tuning.table import load_table

PLACES = 2
"""Sequence places, times the largest batch: a step may admit as many sequences as it releases."""


@dataclass(frozen=True)
class ArchPlan:
    """The bucket plans of one architecture, before their kernels exist."""

    arch: int
    buckets: tuple[BucketPlan, ...]

    def specializations(self) -> list[Specialization]:
        """Every cubin the plan needs, in order of first use."""
        return list(dict.fromkeys(p.launch.specialization for bucket in self.buckets for p in bucket.launches))


def build(
    program: Program,
    weights: Mapping[str, WeightReader],
    options: CudaOptions,
    ctx: BuildContext,
    cubins: CubinCache,
    kernels: tuple[Kernel, ...] | None = None,
) -> TargetFiles:
    """Plan, compile, and collect the files; ``kernels`` other than the discovered ones are for tests.

    Raises TargetError naming the call or kernel at fault.
    """
    kernels = discover() if kernels is None else kernels
    original, program, weights = program, stored(program), packed(program, weights)
    version = compiler_version()
    tables = {arch: load_table(arch, f"triton {version}", options.tuning) for arch in options.archs}
    plans = [plan_arch(program, arch, options, kernels, tables[arch].table) for arch in options.archs]
    jobs = {(plan.arch, spec): Job(spec, plan.arch, version) for plan in plans for spec in plan.specializations()}
    compiled = compile_all(jobs.values(), cubins, ctx.progress, options.jobs)
    files: dict[str, bytes] = {}
    notes: dict[str, Any] = {
        "triton": version,
        "cuda": toolkit_major(options.archs, (spec for _, spec in jobs)),
        "archs": list(options.archs),
        "proven": {f"sm_{plan.arch}": proven(plan.arch, plan.specializations()) for plan in plans},
        "tuning": {f"sm_{arch}": tables[arch].note(f"triton {version}") for arch in options.archs},
        "kernels": {},
        "choices": {},
        "crossover": {},
    }
    for plan in plans:
        found = {spec: compiled[jobs[plan.arch, spec]] for spec in plan.specializations()}
        names = kernel_names(plan)
        launch_plan = replace(finish(program, plan, names, found), packed=changed(original, program))
        files[plan_file(plan.arch)] = launch_plan.to_json().encode()
        files |= {launch_plan.kernels[names[spec]].file: kernel.cubin for spec, kernel in found.items()}
        notes["kernels"][f"sm_{plan.arch}"] = {
            name: {"threads": k.threads, "registers": k.registers, "shared": k.shared, "spills": k.spills}
            for name, k in launch_plan.kernels.items()
        }
        notes["choices"][f"sm_{plan.arch}"] = choices(plan)
        calls = (call for bucket in plan.buckets for call, _ in bucket.choices)
        notes["crossover"][f"sm_{plan.arch}"] = crossovers(calls, original, tables[plan.arch].table)
    log = {"kernels": len(jobs), "compiled": len(cubins.log), "misses": cubins.log}
    return TargetFiles(files, weights, notes, log)


def changed(original: Program, program: Program) -> dict[str, TensorType]:
    """Types of the weights that packing changed."""
    entries = program.weights.items()
    return {name: entry.type for name, entry in entries if entry.type != original.weights[name].type}


def plan_arch(
    program: Program, arch: int, options: CudaOptions, kernels: tuple[Kernel, ...], tuning: Table
) -> ArchPlan:
    """Bucket plans of both functions."""
    select = Selector(kernels)
    plans = []
    for function, dims in buckets(program, options):
        fast = options.accumulates_fast(function.name)
        plans.append(plan_bucket(program, function, dims, arch, select, tuning, fast, options.linear_chains))
    return ArchPlan(arch, tuple(plans))


def buckets(program: Program, options: CudaOptions) -> Iterator[tuple[Function, dict[str, int]]]:
    """Each function with the extents of each of its buckets; no bucket is larger than the program allows."""
    fixed = {name: high for name, (_, high) in program.dims.items() if name.startswith(("W_", "B_"))}
    places = PLACES * max(*options.decode_buckets, *options.extend_sequences)
    decode, extend = (with_feedback(program.functions[name], places) for name in ("decode", "extend"))
    for count in options.decode_buckets:
        yield decode, {**fixed, "T": count, "N": count, "M": count}
    for rows in options.extend_buckets:
        for count in options.extend_sequences:
            if count <= rows:
                yield extend, {**fixed, "T": rows, "N": count, "M": count}


def kernel_names(plan: ArchPlan) -> dict[Specialization, str]:
    """A short, stable name for each cubin: the function and the digest of its specialization."""
    return {s: f"{s.function}_{Job(s, plan.arch, '').identity()[:12]}" for s in plan.specializations()}


def finish(
    program: Program, plan: ArchPlan, names: Mapping[Specialization, str], compiled: Mapping[Specialization, Compiled]
) -> LaunchPlan:
    """Addresses for every buffer, and what the compiler decided for every kernel."""
    zero_bytes = max(bucket.zero_bytes for bucket in plan.buckets)
    maps = {names[spec]: kernel.tensor_maps for spec, kernel in compiled.items()}
    placed = [with_maps(place(bucket, zero_bytes, names.__getitem__), maps) for bucket in plan.buckets]
    kernels = {
        names[s]: Cubin(
            f"kernels/sm_{plan.arch}/{names[s]}.cubin", k.symbol, k.threads, k.shared, k.registers, k.spills
        )
        for s, k in compiled.items()
    }
    return LaunchPlan(plan.arch, dict(sorted(kernels.items())), tuple(placed), persistent(plan))


def persistent(plan: ArchPlan) -> dict[str, View]:
    """Buffers that outlive steps."""
    types = plan.buckets[0].function.types
    return {name: view(dense(name, types[name].dtype, eval_shape(types[name].shape, {})), len(types[name].shape))
            for name in KEPT}  # fmt: skip


def with_maps(bucket: Bucket, maps: Mapping[str, tuple[tuple[tuple[int, ...], int], ...]]) -> Bucket:
    """The bucket with the box and swizzle the compiler chose for each TMA operand."""

    def fix(launch: Launch) -> Launch:
        chosen = iter(maps[launch.kernel])
        args = []
        for arg in launch.args:
            if isinstance(arg, TensorMap):
                box, swizzle = next(chosen)
                arg = replace(arg, box=box, swizzle=swizzle)
            args.append(arg)
        return replace(launch, args=tuple(args))

    return replace(bucket, launches=tuple(fix(launch) if maps[launch.kernel] else launch for launch in bucket.launches))


def place_of(bucket: BucketPlan) -> str:
    """A bucket's name in the notes."""
    return " ".join([bucket.function.name, "x".join(str(bucket.dims[d]) for d in ("T", "N"))])


def choices(plan: ArchPlan) -> dict[str, dict[str, Any]]:
    """For each function and op: which kernel serves it, where, why, and what the others said."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    refused: dict[tuple[str, str, str, str], tuple[str, ...]] = {}
    for bucket in plan.buckets:
        for call, choice in bucket.choices:
            key = (place_of(bucket), call.op, choice.kernel, choice.selection.reason)
            counts[key] += 1
            refused[key] = choice.refused
    found: dict[str, dict[str, Any]] = {}
    for bucket in plan.buckets:
        if bucket.apart:
            entry = {"kernel": "none", "reason": f"linears apart: {bucket.apart}", "calls": 0, "others": []}
            found.setdefault(place_of(bucket), {})[CHAIN] = [entry]
    for (where, op, kernel, reason), count in counts.items():
        entry = {"kernel": kernel, "reason": reason, "calls": count, "others": list(refused[where, op, kernel, reason])}
        found.setdefault(where, {}).setdefault(op, []).append(entry)
    return found
