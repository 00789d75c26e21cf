"""Records the kernel suite for a GPU: python -m pytest tests/targets/cuda/kernels -p tests.targets.cuda.gpu.recorder

Every launch that the suite runs in Triton's interpreter (and compares with float64) goes to $LLMOPT_RECORD, with the
memory before and after it; at the end its kernels are compiled. replay.py runs them on the GPU, with numpy alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmopt.program import dtype_bytes
from targets.cuda.cache import CubinCache, Job
from targets.cuda.compile import compile_all, compiler_version
from targets.cuda.kernel import KernelLaunch, Scratch, Specialization, Strided, TmaOperand
from tests.targets.cuda.gpu.replay import NOT_KEPT
from tests.targets.cuda.kernels import harness

ARCH = 90


class Recorder:
    """Launches so far, each with the buffers it touches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []
        self.specializations: list[Specialization] = []
        self.execute = harness.execute
        folder.mkdir(parents=True, exist_ok=True)

    def record(self, launch: KernelLaunch, memory: harness.Memory) -> None:
        """Run a launch in the interpreter, keeping what it saw and what it left."""
        args = [argument(arg, type_, memory) for (_, type_), arg in zip(launch.specialization.signature, launch.args)]
        names = sorted({arg["buffer"] for arg in args if "buffer" in arg})
        before = {name: raw(memory, name) for name in names}
        self.execute(launch, memory)
        after = {name: raw(memory, name) for name in names}
        arrays = {f"before.{name}": x for name, x in before.items()}
        arrays |= {f"after.{name}": x for name, x in after.items() if not np.array_equal(x, before[name])}
        number = len(self.entries)
        np.savez_compressed(self.folder / f"{number}.npz", **arrays)  # type: ignore[arg-type]
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0].rpartition("::")[2]
        types = {name: harness.dtype_name(memory.flat[name].dtype) for name in names}
        for (_, type_), arg in zip(launch.specialization.signature, launch.args):
            if isinstance(arg, Scratch) and type_ == "*fp64":  # the memory knows words only
                types[arg.name] = "float64"
            if isinstance(arg, Scratch) and launch.specialization.source and not arg.zeroed:
                types[arg.name] = NOT_KEPT
        self.entries.append({"test": test, "grid": launch.grid, "args": args, "types": types})
        self.specializations.append(launch.specialization)

    def compile(self) -> None:
        """The cubins, and the list of launches."""
        version = compiler_version()
        jobs = [Job(spec, ARCH, version) for spec in self.specializations]
        done = compile_all(jobs, CubinCache(), lambda what, at, total: None)
        for entry, job in zip(self.entries, jobs):
            made, name = done[job], f"{job.specialization.function}_{job.identity()[:16]}.cubin"
            (self.folder / name).write_bytes(made.cubin)
            entry |= {"cubin": name, "symbol": made.symbol, "threads": made.threads, "shared": made.shared}
            entry |= {"pdl": job.specialization.pdl, "maps": made.tensor_maps}
        (self.folder / "launches.json").write_text(json.dumps(self.entries))


def argument(arg: Any, type_: str, memory: harness.Memory) -> dict[str, Any]:
    """A launch's argument over the pretended memory; offsets and strides in bytes."""
    match arg:
        case Scratch():
            memory.scratch(arg)
            return {"kind": "pointer", "buffer": arg.name, "offset": 4 * harness.GUARD}
        case Strided():
            return {"kind": "pointer", "buffer": arg.buffer, "offset": place(arg, memory)}
        case TmaOperand(value=value):
            strides = [s * dtype_bytes(value.dtype) for s in value.strides]
            shape = {"dtype": value.dtype, "shape": list(value.shape), "strides": strides}
            return {"kind": "map", "buffer": value.buffer, "offset": place(value, memory), **shape}
    return {"kind": "scalar", "type": type_, "value": arg}


def place(value: Strided, memory: harness.Memory) -> int:
    """Byte offset of a value in its guarded buffer, whose elements may be of another size."""
    return harness.GUARD * memory.flat[value.buffer].element_size() + value.offset * dtype_bytes(value.dtype)


def raw(memory: harness.Memory, name: str) -> npt.NDArray[np.uint8]:
    """A buffer's bytes, guards included."""
    import torch

    found: npt.NDArray[np.uint8] = memory.flat[name].view(torch.uint8).numpy().copy()
    return found


@pytest.fixture(scope="session", autouse=True)
def recorded() -> Iterator[None]:
    """Record the whole session."""
    recorder = Recorder(Path(os.environ["LLMOPT_RECORD"]))
    harness.execute = recorder.record
    yield
    recorder.compile()
