"""Makes a bundle: the calls of a program's buckets, the configurations worth timing for each, their cubins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from llmopt.launch import Cubin, Launch, TensorMap
from llmopt.program import OpCall, Program, dtype_bytes

from ..build import buckets
from ..cache import Compiled, CubinCache, Job
from ..compile import compile_all, compiler_version, toolkit_major
from ..kernel import CallSite, Kernel, KernelLaunch, Scratch, Selection, Strided, TmaOperand
from ..kernels.moe_q import unpacked
from ..options import CudaOptions
from ..pack import STACKS, of_stack
from ..plan import operand, plan_bucket, scratch_name, span_bytes
from ..select import Selector, discover
from .bundle import Buffer, Bundle, Entry
from .candidates import CODES, LINEARS, candidates

Progress = Callable[[str, int, int], None]

CALL = OpCall("tune", {}, ("out",))
"""The call that an entry's scratch buffers are named after."""

SHARED = 227 << 10
"""Bytes of shared memory a program may have on the GPUs of today; older ones refuse the launch."""

CONTEXT = 529
"""Tokens of each sequence of a decode step that attention is timed at: no multiple of a key tile, so that what the last
tile reads in vain counts (at 256 sequences 516 tokens take 150 us a layer of 8B where 512 take 130)."""


@dataclass(frozen=True)
class Case:
    """A call and one configuration of a kernel for it. ``data``: integer inputs by buffer; ``rotating``: buffers that
    each launch takes from another place, so that no cache holds them."""

    model: str
    what: str
    kernel: str
    key: str
    config: dict[str, Any]
    site: CallSite
    selection: Selection
    bytes: int
    flops: int
    data: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rotating: tuple[str, ...] = ()


class Recorder:
    """A kernel that keeps the calls it was asked about."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.name, self.ops = kernel, kernel.name, kernel.ops
        self.sites: list[CallSite] = []

    def select(self, site: CallSite) -> Selection | str:
        """What the kernel says."""
        self.sites.append(site)
        return self.kernel.select(site)


def program_cases(program: Program, options: CudaOptions, arch: int, model: str, only: str = "") -> list[Case]:
    """The cases of every call of a program that a kernel with configurations serves, each key once.

    ``only``: a regular expression over "kernel key".
    """
    recorders = [Recorder(kernel) for kernel in discover()]
    select = Selector(tuple(recorders))
    for function, dims in buckets(program, options):
        fast = options.accumulates_fast(function.name)
        plan_bucket(program, function, dims, arch, select, {}, fast, chains=False)  # which take no configurations
    found: dict[tuple[str, str], list[Case]] = {}
    for recorder in recorders:
        for site in recorder.sites:
            key = keyed(recorder.name, site)
            if key and (recorder.name, key) not in found and re.search(only, f"{recorder.name} {key}"):
                found[recorder.name, key] = list(site_cases(recorder.kernel, site, model, site.call.scope))
    return [case for cases in found.values() for case in cases]


def keyed(kernel: str, site: CallSite) -> str | None:
    """The key of a call, None when there is nothing to try."""
    found = candidates(kernel, site)
    return found[0] if found and found[1] else None


def site_cases(kernel: Kernel, site: CallSite, model: str, what: str, context: int = CONTEXT) -> Iterator[Case]:
    """A case for each configuration of a kernel that serves the call, the first of those that come to equal launches;
    ``context``: tokens of a sequence in decode."""
    site = placed(site, context)
    found, work = candidates(kernel.name, site), work_of(kernel.name, site, context)
    tried = set()
    for config in found[1] if found else ():
        assert found
        selection = kernel.select(replace(site, tuning={kernel.name: {found[0]: config}}))
        if not isinstance(selection, str) and selection.launches not in tried:
            tried.add(selection.launches)
            yield Case(model, what, kernel.name, found[0], config, site, selection, **work)


def work_of(kernel: str, site: CallSite, context: int) -> dict[str, Any]:
    """What a call must move and do, the integers it reads, and the operands that no cache should hold."""
    if kernel == "attention":
        data = integers(site, context)
        moved, flops = attention_work(site, data)
        return {"bytes": moved, "flops": flops, "data": data, "rotating": ("k_state", "v_state")}
    if kernel == "moe":
        moved, flops = experts_work(site)
        return {"bytes": moved, "flops": flops, "data": {"index": choices(site)}, "rotating": ("gate_up", "down")}
    if kernel == "moe_q":
        moved, flops = quantized_experts_work(site)
        rotating = ("gate_up_codes", "down_codes")
        return {"bytes": moved, "flops": flops, "data": {"index": choices(site)}, "rotating": rotating}
    if kernel in CODES and "codes" in site.values:
        moved, flops = quantized_work(site)
        return {"bytes": moved, "flops": flops, "data": bounds(site), "rotating": ("codes",)}
    moved, flops = linear_work(site)
    return {"bytes": moved, "flops": flops, "data": bounds(site), "rotating": ("weight",)}


def placed(site: CallSite, context: int) -> CallSite:
    """The call with each operand in a buffer named after its parameter, states no larger than the call needs."""
    values: dict[str, Any] = {}
    for name, value in site.values.items():
        if isinstance(value, Strided) and name in ("k_state", "v_state"):
            blocks = site.values["block_table"].shape[0] * -(-tokens(site, context) // value.shape[2])
            value = replace(value, shape=(blocks, *value.shape[1:]))
        values[name] = replace(value, buffer=name) if isinstance(value, Strided) else value
    names = ("out", *(f"out{i}" for i in range(1, len(site.outputs))))
    held = {v.buffer: values[n] for n, v in site.values.items() if isinstance(v, Strided)}
    outputs = tuple(held.get(o.buffer) or replace(o, buffer=n) for n, o in zip(names, site.outputs))
    return replace(site, call=replace(site.call, outputs=names[: len(outputs)]), values=values, outputs=outputs)


def tokens(site: CallSite, context: int) -> int:
    """Tokens of each sequence of an attention call: all of them new in prefill."""
    sequences, rows = site.values["block_table"].shape[0], site.values["q"].shape[2]
    return context if site.function == "decode" else -(-rows // sequences)


def integers(site: CallSite, context: int) -> dict[str, tuple[int, ...]]:
    """Tables, lengths and scales, all 1, of an attention call whose sequences are equally long."""
    sequences, width = site.values["block_table"].shape
    blocks, _, size, _ = site.values["k_state"].shape
    rows, each, length = site.values["q"].shape[2], blocks // sequences, tokens(site, context)
    bounds = [min(i * -(-rows // sequences), rows) for i in range(sequences + 1)]
    data = {
        "block_table": tuple(min(i * each + j, blocks - 1) for i in range(sequences) for j in range(width)),
        "cu_seqlens": tuple(bounds),
        "seq_lens": tuple(length if site.function == "decode" else b - a for a, b in pairwise(bounds)),
    }
    data |= {n: (1,) * v.shape[0] for n in ("k_scale", "v_scale") if (v := site.values.get(n)) is not None}
    if "slot_mapping" in site.values:
        last = length - 1
        data["slot_mapping"] = tuple((i * each + last // size) * size + last % size for i in range(rows))
    return data


def bounds(site: CallSite) -> dict[str, tuple[int, ...]]:
    """Where a linear of the extend function finds its number of rows: all of them are real."""
    count = site.dims.get("N", 0)
    return {"cu_seqlens": (0,) * count + (site.dims["T"],)} if site.function == "extend" else {}


def attention_work(site: CallSite, data: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Bytes and operations of an attention call."""
    (_, heads, rows, d), (_, shared, _, dv) = site.values["q"].shape, site.values["v_state"].shape
    pairs = 0
    for i, length in enumerate(data["seq_lens"]):
        new = data["cu_seqlens"][i + 1] - data["cu_seqlens"][i]
        pairs += new * length - new * (new - 1) // 2
    kept, size = dtype_bytes(site.values["k_state"].dtype), dtype_bytes(site.values["q"].dtype)
    moved = kept * sum(data["seq_lens"]) * shared * (d + dv) + size * rows * heads * (d + dv)
    return moved, 2 * pairs * heads * (d + dv)


def choices(site: CallSite) -> tuple[int, ...]:
    """Different experts for each row, evenly spread."""
    v = site.values
    (rows, each), experts = v["index"].shape, v.get("down", v.get("down_codes")).shape[0]
    random = Random(0)
    return tuple(e for _ in range(rows) for e in random.sample(range(experts), each))


def experts_work(site: CallSite) -> tuple[int, int]:
    """Bytes and operations of a mixture's experts: the weights of those that any row chose."""
    (_, width, inner), (rows, each) = site.values["down"].shape, site.values["index"].shape
    chosen = len(set(choices(site)))
    return 2 * (3 * chosen * width * inner + 2 * rows * width), 6 * rows * each * width * inner


def quantized_experts_work(site: CallSite) -> tuple[int, int]:
    """The same over quantized weights: codes, scales and zeros."""
    v, (rows, each) = site.values, site.values["index"].shape
    experts, width, inner = unpacked(of_stack(v, "down")).shape
    tables = [of_stack(v, stack)[name] for stack in STACKS for name in ("codes", "scales", "zeros")]
    stored = sum(prod(t.shape) * dtype_bytes(t.dtype) for t in tables if t is not None)
    return stored * len(set(choices(site))) // experts + 4 * rows * width, 6 * rows * each * width * inner


def quantized_work(site: CallSite) -> tuple[int, int]:
    """Bytes and operations of a linear over quantized weights."""
    operands = [site.values.get(name) for name in ("x", "codes", "scales", "zeros", "residual")]
    moved = sum(prod(t.shape) * dtype_bytes(t.dtype) for t in (*operands, site.outputs[0]) if t is not None)
    return moved, 2 * prod(site.values["x"].shape) * site.values["codes"].shape[0]


def linear_work(site: CallSite) -> tuple[int, int]:
    """Bytes and operations of a linear."""
    (n, k), x, out = site.values["weight"].shape, site.values["input"], site.outputs[0]
    m = 1
    for extent in x.shape[:-1]:
        m *= extent
    size = dtype_bytes(x.dtype)
    return size * (n * k + m * k + m * out.shape[-1] * (2 if site.values.get("residual") else 1)), 2 * m * n * k


def build_bundle(folder: Path, cases: list[Case], arch: int, progress: Progress, workers: int = 0) -> Bundle:
    """Compile the cases' kernels and write the bundle; what wants more shared memory than there is, is left out."""
    version = compiler_version()
    jobs = {x.specialization: Job(x.specialization, arch, version) for c in cases for x in c.selection.launches}
    compiled = compile_all(jobs.values(), CubinCache(), progress, workers)
    bundle = Bundle(folder, arch, f"triton {version}", toolkit_major((arch,), ()))
    for case in cases:
        kernels = [compiled[jobs[x.specialization]] for x in case.selection.launches]
        if any(kernel.shared > SHARED for kernel in kernels):
            continue
        launches = []
        for one, kernel in zip(case.selection.launches, kernels):
            name = f"{one.specialization.function}_{jobs[one.specialization].identity()[:16]}"
            if name not in bundle.cubins:
                cubin = Cubin(f"cubins/{name}.cubin", kernel.symbol, kernel.threads, kernel.shared, kernel.registers,
                              kernel.spills)  # fmt: skip
                bundle.add_cubin(name, cubin, kernel.cubin)
            launches.append(described(name, one, kernel))
        bundle.entries.append(entry(case, tuple(launches)))
    bundle.write()
    return bundle


def described(name: str, one: KernelLaunch, kernel: Compiled) -> Launch:
    """A launch with the boxes the compiler chose."""
    types = one.specialization.signature
    chosen = iter(kernel.tensor_maps)
    args = []
    for (_, type_), arg in zip(types, one.args, strict=True):
        made = operand(arg, type_, CALL)
        if isinstance(made, TensorMap):
            box, swizzle = next(chosen)
            made = replace(made, box=box, swizzle=swizzle)
        args.append(made)
    return Launch(name, one.grid, tuple(args), one.specialization.pdl, one.bytes)


def entry(case: Case, launches: tuple[Launch, ...]) -> Entry:
    """What the timing needs to know of a case."""
    buffers: dict[str, Buffer] = {}
    site, out = case.site, case.site.outputs[0]
    spared = [a.whole() for one in case.selection.launches for a in one.args if isinstance(a, TmaOperand) and a.spare]
    for x in [*(v for v in site.values.values() if isinstance(v, Strided)), *site.outputs, *spared]:
        size = max(span_bytes(x), 16)
        data = case.data.get(x.buffer, ())
        kind = "data" if data else "pool" if x.buffer in case.rotating else "random"
        if x.buffer not in buffers or buffers[x.buffer].bytes < size:
            buffers[x.buffer] = Buffer(size, kind, x.dtype, data)
    for name, data in case.data.items():
        buffers.setdefault(name, Buffer(4 * len(data), "data", "int32", data))
    for launch in case.selection.launches:
        for arg in launch.args:
            if isinstance(arg, Scratch):
                buffers[scratch_name(CALL, arg)] = Buffer(arg.bytes, "zero")
    count = 1
    for extent in out.shape:
        count *= extent
    return Entry(case.model, case.what, case.kernel, case.key, case.config, case.bytes, case.flops, buffers, launches,
                 (out.buffer, out.dtype, count), linear_check(case))  # fmt: skip


def linear_check(case: Case) -> dict[str, Any] | None:
    """What a float64 check of a linear needs; operands must be dense, without norm or bias."""
    v = case.site.values
    if "weight" not in v or case.kernel not in LINEARS or v.get("norm") is not None or v["bias"] is not None:
        return None
    if not v["input"].contiguous:
        return None
    (n, k), m = v["weight"].shape, case.flops // (2 * v["weight"].shape[0] * v["weight"].shape[1])
    return {"m": m, "n": n, "k": k, "gate": v.get("gate"), "residual": v.get("residual") is not None}
