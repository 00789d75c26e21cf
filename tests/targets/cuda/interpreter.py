"""Runs a launch plan on the CPU: Triton's interpreter over byte regions laid out as on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmopt.launch import Bucket, LaunchPlan, Pointer, Scalar, TensorMap, View
from llmopt.program import Program, StateGroup, dtype_bytes
from llmopt.runtime.executors.cuda.backend import Result, Tail
from llmopt.runtime.executors.cuda.layout import (
    Region,
    inputs_region,
    is_table,
    persistent_region,
    states_region,
    tables_region,
    weights_region,
)
from llmopt.runtime.executors.cuda.steps import Arrays
from llmopt.runtime.protocol import IntArray
from llmopt.target import WeightReader
from targets.cuda.build import ArchPlan, kernel_names
from targets.cuda.kernel import Specialization
from tests.targets.cuda.kernels.harness import described, interpretable

GUARD = 4096
"""Bytes of 0xFF (NaN in every float format) around each region: a stray read shows in the logits."""

TYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32, "*fp64": torch.float64,
         "*i64": torch.int64, "*i32": torch.int32, "*i16": torch.int16, "*i8": torch.int8, "*u8": torch.uint8,
         "*i1": torch.bool, "*fp8e4nv": torch.float8_e4m3fn}  # fmt: skip


class Bytes:
    """A region of the pretended device memory, poisoned with NaN unless filled."""

    def __init__(self, size: int, fill: int = 0xFF) -> None:
        raw = torch.full((size + 2 * GUARD + 256,), 0xFF, dtype=torch.uint8)
        start = GUARD + -(raw.data_ptr() + GUARD) % 256
        self.data = raw[start : start + size + GUARD]
        self.data[:size] = fill

    def view(self, offset: int, dtype: torch.dtype) -> torch.Tensor:
        """Everything from an offset on, as elements."""
        tail = self.data[offset:]
        return tail[: len(tail) // dtype.itemsize * dtype.itemsize].view(dtype)

    def put(self, offset: int, data: npt.NDArray[Any]) -> None:
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.data[offset : offset + len(raw)] = torch.from_numpy(raw.copy())


class PlanInterpreter:
    """The cuda executor's backend without a GPU. The arena holds NaN, and is poisoned again where a bucket's plan
    says a buffer is dead, so that reading what was never written shows."""

    def __init__(
        self,
        program: Program,
        plan: LaunchPlan,
        arch_plan: ArchPlan,
        weights: Mapping[str, WeightReader],
        blocks: Mapping[str, int],
    ) -> None:
        self.program, self.plan, self.blocks = program, plan, blocks
        names = kernel_names(arch_plan)
        self.specializations: dict[str, Specialization] = {name: spec for spec, name in names.items()}
        self.where = weights_region(program)
        self.weights = Bytes(self.where.size)
        for name, reader in weights.items():
            self.weights.put(
                self.where.offsets[name], np.concatenate([np.atleast_1d(c) for c in reader.chunks(1 << 30)])
            )
        self.state_offsets = states_region(program.states, blocks)
        self.states = Bytes(self.state_offsets.size, 0)
        self.table_offsets = tables_region(plan)
        self.tables = Bytes(self.table_offsets.size, 0)
        self.kept_offsets = persistent_region(plan)
        self.kept = Bytes(self.kept_offsets.size, 0)
        self.arena = Bytes(plan.arena_bytes)
        for bucket in plan.buckets:
            for offset, size in bucket.zeroed:
                self.arena.data[offset : offset + size] = 0
        self.flying: list[tuple[Bucket, Bytes]] = []
        self.results: dict[int, Result] = {}

    def keep(self, place: int, rows: Arrays) -> None:
        for name, row in rows.items():
            view = self.plan.persistent[name]
            self.kept.put(self.kept_offsets.offsets[name] + place * view.strides[0] * dtype_bytes(view.dtype), row)

    def forward(self, bucket: int, inputs: Arrays) -> int:
        chosen = self.plan.buckets[bucket]
        packed = inputs_region(chosen)
        region = Bytes(packed.size)
        for name, value in inputs.items():
            if is_table(name):
                width = chosen.inputs[name].shape[1]
                at = self.table_offsets.offsets[f"{chosen.function}/{name}"]
                for i, row in enumerate(value):
                    self.tables.put(at + i * width * row.itemsize, row)
            else:
                region.put(packed.offsets[name], value)
        for launch in chosen.launches:
            self._launch(launch.kernel, launch.grid, launch.args, chosen, region, packed)
        self.flying.append((chosen, region))
        return len(self.flying) - 1

    def finish(self, handle: int, tail: Tail) -> None:
        assert handle == len(self.flying) - 1, "what follows a forward pass comes before the next one"
        chosen, region = self.flying[handle]
        self.kept.put(self.kept_offsets.offsets["masks"], tail.masks)
        drawing = {"nothing": (), "greedy": chosen.greedy, "full": chosen.sampling}[tail.draw]
        for launch in drawing:
            self._launch(launch.kernel, launch.grid, launch.args, chosen, region, inputs_region(chosen))
        for offset, size in chosen.zeroed:
            assert not self.arena.data[offset : offset + size].any(), "a kernel left its counters dirty"
        logits = self._read(chosen, chosen.logits)[tail.logits].float().numpy().copy()
        tokens = self._read(chosen, chosen.sampled).numpy().astype(np.int64)
        self.results[handle] = Result(tokens, self._read(chosen, chosen.reports).numpy().copy(), logits)

    def _read(self, bucket: Bucket, view: View) -> torch.Tensor:
        flat = self.arena.view(bucket.offsets[view.name] + view.offset, getattr(torch, view.dtype))
        return torch.as_strided(flat, view.shape, view.strides)

    def _launch(
        self, name: str, grid: tuple[int, int, int], args: Any, bucket: Bucket, region: Bytes, packed: Region
    ) -> None:
        spec = self.specializations[name]
        function = interpretable(spec)
        values: dict[str, Any] = dict(spec.constexprs)
        for (parameter, type_), arg in zip(spec.signature, args, strict=True):
            match arg:
                case Pointer(buffer, offset):
                    where, base = self._find(buffer, bucket, region, packed)
                    values[parameter] = where.view(base + offset, TYPES[type_])
                case Scalar(_, value):
                    values[parameter] = value
                case TensorMap():
                    values[parameter] = self._descriptor(spec, arg, bucket, region, packed)
        with np.errstate(all="ignore"):  # padding rows hold whatever the arena held
            function[grid](**values)

    def _descriptor(self, spec: Specialization, arg: TensorMap, bucket: Bucket, region: Bytes, packed: Region) -> Any:
        where, base = self._find(arg.name, bucket, region, packed)
        size = dtype_bytes(arg.dtype)
        strides = [s // size for s in arg.strides]
        flat = where.view(base + arg.offset, getattr(torch, arg.dtype))
        rows = min(arg.shape[0], len(flat) // strides[0])  # states are described by a bound on their blocks
        shape = [rows, *arg.shape[1:]]
        return described(spec, torch.as_strided(flat, shape, strides), arg.box)

    def _find(self, name: str, bucket: Bucket, region: Bytes, packed: Region) -> tuple[Bytes, int]:
        if name in bucket.offsets:
            return self.arena, bucket.offsets[name]
        if name in packed.offsets:
            return region, packed.offsets[name]
        if name in self.state_offsets.offsets:
            return self.states, self.state_offsets.offsets[name]
        if name in self.kept_offsets.offsets:
            return self.kept, self.kept_offsets.offsets[name]
        if is_table(name):
            return self.tables, self.table_offsets.offsets[f"{bucket.function}/{name}"]
        return self.weights, self.where.offsets[name]

    def result(self, handle: int) -> Result:
        return self.results.pop(handle)

    def copy_blocks(self, group: StateGroup, source: IntArray, target: IntArray) -> None:
        self.write_blocks(group, target, self.read_blocks(group, source))

    def _states(self, group: StateGroup) -> list[tuple[int, int]]:
        sizes = [s.heads * group.block_size * s.head_dim * dtype_bytes(s.dtype) for s in group.states]
        return [(self.state_offsets.offsets[s.input], size) for s, size in zip(group.states, sizes)]

    def read_blocks(self, group: StateGroup, blocks: IntArray) -> list[npt.NDArray[np.uint8]]:
        return [
            np.stack(
                [self.states.data[base + b * size : base + (b + 1) * size].numpy().copy() for b in blocks.tolist()]
            )
            for base, size in self._states(group)
        ]

    def write_blocks(self, group: StateGroup, blocks: IntArray, data: list[npt.NDArray[np.uint8]]) -> None:
        for (base, size), rows in zip(self._states(group), data):
            for row, block in zip(rows, blocks.tolist()):
                self.states.put(base + block * size, row)

    def close(self) -> None:
        self.results.clear()
