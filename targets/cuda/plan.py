"""Plans one bucket: resolves views, chooses kernels, places every buffer in the arena."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmopt.errors import TargetError
from llmopt.launch import Bucket, Launch, Operand, Pointer, Scalar, TensorMap, View
from llmopt.lower.memory import ALIGNMENT, Interval, plan_memory
from llmopt.program import Function, OpCall, Program, dtype_bytes, eval_shape

from .chain import CHAIN, chained
from .feedback import DRAWN, GREEDY, KEPT, REPORTS, SAMPLE
from .fusion import ATTENTION, fused
from .kernel import CallSite, KernelLaunch, Scratch, Specialization, Strided, TmaOperand
from .select import Choice, Selector
from .views import evaluate, resolve_view

IN_PLACE = {
    "llmopt.kv_write": {0: "k_state", 1: "v_state"},
    "llmopt.rope_kv_write": {1: "k_state", 2: "v_state"},
    ATTENTION: {1: "k_state", 2: "v_state"},
}
"""Outputs that are the updated versions of an argument and share its memory."""


def dense(buffer: str, dtype: str, shape: tuple[int, ...]) -> Strided:
    """A row-major tensor."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * extent)
    return Strided(buffer, dtype, shape, tuple(reversed(strides))[: len(shape)] if shape else ())


def nbytes(x: Strided) -> int:
    """Bytes of a dense tensor, rounded up to the arena's alignment."""
    size = dtype_bytes(x.dtype)
    for extent in x.shape:
        size *= extent
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PlannedLaunch:
    """A launch and the call it serves; ``key`` names the kernel in the plan."""

    launch: KernelLaunch
    call: OpCall
    index: int


@dataclass
class BucketPlan:
    """What planning a bucket found: launches before addresses are known, buffers, each call's choice, and why chains of
    linears were left apart."""

    function: Function
    dims: dict[str, int]
    launches: list[PlannedLaunch]
    buffers: dict[str, int]
    zeroed: dict[str, int]
    outputs: dict[str, Strided]
    choices: list[tuple[OpCall, Choice]] = field(default_factory=list)
    apart: str = ""

    @property
    def zero_bytes(self) -> int:
        """Bytes of the zeroed buffers."""
        return sum(self.zeroed.values())


def plan_bucket(
    program: Program,
    function: Function,
    dims: Mapping[str, int],
    arch: int,
    select: Selector,
    tuning: Mapping[str, Mapping[str, Any]],
    fast: bool = False,
    chains: bool = True,
) -> BucketPlan:
    """Join calls, and choose kernels for every one that moves data. ``fast``: FP8 products may be summed with fast
    accumulation; ``chains``: linears of one row may share a launch, unless the kernel refuses it: then ``apart`` of the
    plan says why. Raises TargetError for a call nothing serves."""
    function, apart = fused(function, dims, select.ops, arch, fast), ""
    if chains:
        try:
            whole = chained(function, dims, select.ops, arch)
            return plan_calls(program, whole, dims, arch, select, tuning)
        except UnservedChain as error:
            apart = str(error)
    return replace(plan_calls(program, function, dims, arch, select, tuning), apart=apart)


class UnservedChain(Exception):
    """A chain that no kernel serves; its linears are served apart."""


def plan_calls(
    program: Program,
    function: Function,
    dims: Mapping[str, int],
    arch: int,
    select: Selector,
    tuning: Mapping[str, Mapping[str, Any]],
) -> BucketPlan:
    """The plan of a function whose calls are joined; raises UnservedChain."""
    values = {name: dense(name, w.type.dtype, eval_shape(w.type.shape, {})) for name, w in program.weights.items()}
    for name in (*function.inputs, *KEPT):
        kind = function.types[name]
        values[name] = dense(name, kind.dtype, eval_shape(kind.shape, dims))
    plan = BucketPlan(function, dict(dims), [], {}, {}, {})
    for index, call in enumerate(function.calls):
        arguments = {name: evaluate(arg, values, dims) for name, arg in call.args.items()}
        views = resolve_view(call.op, arguments) or identity_rows(function, call, arguments, dims)
        if views is not None:
            values.update(zip(call.outputs, views, strict=True))
            continue
        outputs = allocate(function, call, arguments, dims)
        values.update(zip(call.outputs, outputs))
        plan.buffers.update({o.buffer: nbytes(o) for name, o in zip(call.outputs, outputs) if o.buffer == name})
        types = {n: function.types[n] for n in (*call.refs(), *call.outputs) if n in function.types}
        types |= {n: program.weights[n].type for n in call.refs() if n in program.weights}
        site = CallSite(call, types, arguments, outputs, dims, function.name, arch, tuning)
        if call.op == CHAIN and (why := select.refusal(site)):
            raise UnservedChain(why)
        choice = select(site)
        plan.choices.append((call, choice))
        for launch in choice.selection.launches:
            check_alignment(launch, call)
            plan.launches.append(PlannedLaunch(launch, call, index))
            claim_scratch(plan, launch, call)
    plan.outputs = {"logits": values[function.outputs[0]], DRAWN: values[DRAWN], REPORTS: values[REPORTS]}
    return plan


def identity_rows(
    function: Function, call: OpCall, arguments: Mapping[str, Any], dims: Mapping[str, int]
) -> tuple[Strided, ...] | None:
    """Decode gives every row's logits in order (logit row i is row i), so picking those rows moves nothing."""
    index = arguments.get("index")
    wanted = function.name == "decode" and call.op == "aten.index_select.default" and dims.get("M") == dims.get("T")
    return (arguments["self"],) if wanted and isinstance(index, Strided) and index.buffer == "logit_rows" else None


def allocate(
    function: Function, call: OpCall, arguments: Mapping[str, Any], dims: Mapping[str, int]
) -> tuple[Strided, ...]:
    """Where a call's outputs go: a buffer each, but updated states stay where they are."""
    shared = IN_PLACE.get(call.op, {})
    return tuple(
        arguments[shared[i]] if i in shared else dense(name, function.types[name].dtype, shape(function, name, dims))
        for i, name in enumerate(call.outputs)
    )


def shape(function: Function, name: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Extents of a value."""
    return eval_shape(function.types[name].shape, dims)


def claim_scratch(plan: BucketPlan, launch: KernelLaunch, call: OpCall) -> None:
    """Buffers for a launch's scratch; launches of one call share scratch of one name."""
    for arg in launch.args:
        if isinstance(arg, Scratch):
            size = -(-arg.bytes // ALIGNMENT) * ALIGNMENT
            (plan.zeroed if arg.zeroed else plan.buffers)[scratch_name(call, arg)] = size


def scratch_name(call: OpCall, scratch: Scratch) -> str:
    """Arena name of a call's scratch buffer."""
    return f"{call.outputs[0]}/{scratch.name}"


def check_alignment(launch: KernelLaunch, call: OpCall) -> None:
    """Pointers must be 16-byte aligned where the kernel was told so."""
    for (parameter, type_), arg in zip(launch.specialization.signature, launch.args, strict=True):
        if type_.startswith("*") and isinstance(arg, Strided) and parameter not in launch.specialization.unaligned:
            offset = arg.offset * dtype_bytes(arg.dtype)
            if offset % 16:
                what = f"{launch.specialization.function}: pointer {parameter} is {offset % 16} bytes off alignment"
                raise TargetError(what, where=f"{call.op} {call.scope}", hint="the kernel must list it in unaligned")


def lifetimes(plan: BucketPlan) -> list[Interval]:
    """Live interval of each arena buffer in launch order; logits and drawn tokens outlive the bucket."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, planned in enumerate(plan.launches):
        touched = [*buffers_of(planned), *(name for name in planned.call.outputs if name in plan.buffers)]
        for name in touched:
            if name in plan.buffers:
                first.setdefault(name, at)
                last[name] = at
    last |= {output.buffer: len(plan.launches) for output in plan.outputs.values()}
    return [Interval(name, first[name], last[name], plan.buffers[name]) for name in first]


def buffers_of(planned: PlannedLaunch) -> list[str]:
    """Names of the buffers a launch touches."""
    names = []
    for arg in planned.launch.args:
        match arg:
            case Strided():
                names.append(arg.buffer)
            case TmaOperand():
                names.append(arg.value.buffer)
            case Scratch():
                names.append(scratch_name(planned.call, arg))
    return names


def place(plan: BucketPlan, zero_bytes: int, kernel_name: Callable[[Specialization], str]) -> Bucket:
    """The bucket with addresses: zeroed buffers first (``zero_bytes`` are theirs in every bucket), then the arena."""
    memory = plan_memory(lifetimes(plan))
    offsets = {name: zero_bytes + offset for name, offset in memory.offsets.items()}
    zeroed, at = [], 0
    for name, size in plan.zeroed.items():
        offsets[name] = at
        zeroed.append((at, size))
        at += size
    launches: dict[str, list[Launch]] = {"": [], GREEDY: [], SAMPLE: []}
    end = zero_bytes + memory.total
    for planned in plan.launches:
        spec = planned.launch.specialization
        given = [spared(arg, plan.buffers) for arg in planned.launch.args]
        args = tuple(operand(arg, type_, planned.call) for (_, type_), arg in zip(spec.signature, given))
        whole = [x.whole() for x in given if isinstance(x, TmaOperand) and x.spare]
        end = max([end, *(offsets[x.buffer] + span_bytes(x) for x in whole)])
        grid, moved, scope = planned.launch.grid, planned.launch.bytes, planned.call.scope
        graph = planned.call.op if planned.call.op in launches else ""
        resident = planned.launch.resident
        launches[graph].append(Launch(kernel_name(spec), grid, args, spec.pdl, moved, scope, resident))
    return Bucket(
        function=plan.function.name,
        dims=dict(sorted(plan.dims.items())),
        inputs=inputs(plan),
        launches=tuple(launches[""]),
        greedy=tuple(launches[GREEDY]),
        sampling=tuple(launches[SAMPLE]),
        offsets=dict(sorted(offsets.items())),
        arena_bytes=end,
        logits=view(plan.outputs["logits"], 2),
        sampled=view(plan.outputs[DRAWN], 1),
        reports=view(plan.outputs[REPORTS], 2),
        zeroed=tuple(zeroed),
    )


def spared(arg: Any, arena: Collection[str]) -> Any:
    """An argument, its rows to spare kept in the arena only: that is made to reach as far as whole boxes do."""
    return replace(arg, spare=arg.spare and arg.value.buffer in arena) if isinstance(arg, TmaOperand) else arg


def span_bytes(x: Strided) -> int:
    """Bytes from the start of a value's buffer to its last element's end."""
    span = x.offset + sum((count - 1) * stride for count, stride in zip(x.shape, x.strides)) + 1
    return span * dtype_bytes(x.dtype)


def operand(arg: Any, type_: str, call: OpCall) -> Operand:
    """A kernel argument as the plan keeps it. Box and swizzle of a TMA operand are the kernel's wish; the build
    replaces them by what the compiler chose."""
    match arg:
        case Strided():
            return Pointer(arg.buffer, arg.offset * dtype_bytes(arg.dtype))
        case Scratch():
            return Pointer(scratch_name(call, arg))
        case TmaOperand():
            value = arg.whole()
            size = dtype_bytes(value.dtype)
            strides = tuple(s * size for s in value.strides)
            return TensorMap(value.buffer, value.offset * size, value.dtype, value.shape, strides, arg.box, arg.swizzle)
    return Scalar(type_, arg)


def view(x: Strided, rank: int) -> View:
    """A tensor as the host sees it: its last ``rank`` dimensions."""
    return View(x.buffer, x.dtype, x.shape[-rank:], x.strides[-rank:], x.offset * dtype_bytes(x.dtype))


def inputs(plan: BucketPlan) -> dict[str, View]:
    """The bucket's inputs that the host sends: all but the states."""
    function = plan.function
    sent = [name for name in function.inputs if name not in function.state_outputs]
    return {n: view(dense(n, function.types[n].dtype, shape(function, n, plan.dims)), len(function.types[n].shape))
            for n in sent}  # fmt: skip
