"""Replays a recorded kernel suite on a GPU: python tests/targets/cuda/gpu/replay.py FOLDER [TEXT] (numpy only)

Each buffer is an allocation of its own, so that compute-sanitizer's memcheck sees what leaves it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from llmopt.artifact.dtypes import numpy_dtype
from llmopt.launch import Cubin, Launch, Pointer, Scalar, TensorMap
from llmopt.runtime.executors.cuda.driver import call, open_device
from llmopt.runtime.executors.cuda.launches import BoundLaunch, Kernels

Bytes = npt.NDArray[np.uint8]

NOT_KEPT = "scratch"
"""The type of what a kernel in CUDA C++ leaves in scratch and its twin in PyTorch does not."""

TOLERANCE = {
    "bfloat16": 2.0**-6,
    "float16": 2.0**-9,
    "float32": 2.0**-9,
    "float64": 2.0**-9,
    "int8": 2.0**-6,
    "float8_e4m3fn": 2.0**-3,
}
"""Of a buffer's largest entry: the interpreter sums in another order and has other exponentials, and what float32
buffers hold was rounded to bfloat16 on the way (attention's weights). Codes of eight bits may be a step away."""


@dataclass
class Replay:
    """Runs one launch after another on the current device."""

    folder: Path
    stream: Any = field(default_factory=lambda: call("cuStreamCreate", 1))

    def run(self, number: int, entry: dict[str, Any]) -> str:
        """Empty, or what is wrong with the memory the launch leaves."""
        for name, (found, expected) in self.left(number, entry).items():
            if wrong := difference(found, expected, entry["types"][name]):
                return f"{name}: {wrong}"
        return ""

    def left(self, number: int, entry: dict[str, Any]) -> dict[str, tuple[Bytes, Bytes]]:
        """What the launch leaves in each buffer, here and in the interpreter."""
        arrays, found = np.load(self.folder / f"{number}.npz"), {}
        held = {name: upload(arrays[f"before.{name}"]) for name in entry["types"]}
        launch, cubin = described(entry)
        kernels = Kernels({"kernel": cubin}, lambda name: (self.folder / name).read_bytes())
        try:
            bound = BoundLaunch(launch, cubin, kernels.get("kernel"), held.__getitem__, self.stream)
            bound()
            call("cuStreamSynchronize", self.stream)
            for name in entry["types"]:
                expected = arrays[f"after.{name}" if f"after.{name}" in arrays else f"before.{name}"]
                found[name] = download(held[name], len(expected)), expected
        finally:
            kernels.close()
            for address in held.values():
                call("cuMemFree", address)
        return found


def described(entry: dict[str, Any]) -> tuple[Launch, Cubin]:
    """The launch as the executor's plan would hold it."""
    maps = iter(entry["maps"])
    args: list[Any] = []
    for arg in entry["args"]:
        if arg["kind"] == "pointer":
            args.append(Pointer(arg["buffer"], arg["offset"]))
        elif arg["kind"] == "scalar":
            args.append(Scalar(arg["type"], arg["value"]))
        else:
            box, swizzle = next(maps)
            shape, strides = tuple(arg["shape"]), tuple(arg["strides"])
            args.append(TensorMap(arg["buffer"], arg["offset"], arg["dtype"], shape, strides, tuple(box), swizzle))
    cubin = Cubin(entry["cubin"], entry["symbol"], entry["threads"], entry["shared"], 0, 0)
    return Launch("kernel", tuple(entry["grid"]), tuple(args), entry["pdl"]), cubin


def upload(data: npt.NDArray[np.uint8]) -> int:
    """An allocation of exactly these bytes."""
    address = int(call("cuMemAlloc", len(data)))
    call("cuMemcpyHtoD", address, data.ctypes.data, len(data))
    return address


def download(address: int, size: int) -> npt.NDArray[np.uint8]:
    """Bytes of an allocation."""
    data = np.empty(size, np.uint8)
    call("cuMemcpyDtoH", data.ctypes.data, address, size)
    return data


def difference(found: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8], dtype: str) -> str:
    """Empty, or how two buffers differ: integers must be equal, floats near, NaN where NaN is expected."""
    if dtype == NOT_KEPT:
        return ""
    if dtype not in TOLERANCE:
        count = int((found != expected).sum())
        return f"{count} bytes differ" if count else ""
    a, b = (x.view(numpy_dtype(dtype)).astype(np.float64) for x in (found, expected))
    if (np.isnan(a) != np.isnan(b)).any():
        return f"{int((np.isnan(a) != np.isnan(b)).sum())} entries are NaN on one side"
    some = np.isfinite(b)
    if not np.array_equal(a[~some & ~np.isnan(b)], b[~some & ~np.isnan(b)]):
        return "infinities differ"
    if not some.any():
        return ""
    error, scale = np.abs(a[some] - b[some]).max(), np.abs(b[some]).max()
    return "" if error <= TOLERANCE[dtype] * max(scale, 1e-6) else f"error {error:.3g}, largest entry {scale:.3g}"


def rms_error(found: Bytes, expected: Bytes, dtype: str) -> float:
    """‖found - expected‖ / ‖expected‖ of what is finite in the interpreter's buffer; NaN counts as infinite."""
    a, b = (x.view(numpy_dtype(dtype)).astype(np.float64) for x in (found, expected))
    some = np.isfinite(b)
    error = float(np.sqrt(np.square(a[some] - b[some]).sum() / np.square(b[some]).sum()))
    return error if error == error else float("inf")


def replay(folder: Path, text: str = "") -> list[str]:
    """One line for each launch (whose test's name holds ``text``) that leaves something else than the interpreter."""
    replayer, wrong = Replay(folder), []
    for number, entry in enumerate(json.loads((folder / "launches.json").read_text())):
        if text in entry["test"] and (what := replayer.run(number, entry)):
            wrong.append(f"{entry['test']}, {entry['symbol']}: {what}")
    return wrong


def main() -> None:
    """Replay; exit 1 when something differs."""
    device = open_device("cuda")
    wrong = replay(Path(sys.argv[1]), *sys.argv[2:])
    print(*wrong, f"{len(wrong)} launches differ", sep="\n")
    device.close()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
