"""Launches with addresses: parameters packed once, launched directly or captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver as cu  # type: ignore[import-untyped]

from llmopt.launch import Cubin, Launch, Pointer, Scalar, TensorMap
from llmopt.program import dtype_bytes
from llmopt.runtime.executors.cuda.driver import call

_NUMPY: dict[str, Any] = {
    "i32": np.int32,
    "i64": np.int64,
    "fp32": np.float32,
    "u32": np.uint32,
    "u64": np.uint64,
    "i1": np.uint8,
}
_MAP_BYTES = 128
_STATIC_SHARED = 48 << 10
_SWIZZLE = {0: "NONE", 32: "32B", 64: "64B", 128: "128B"}
_ELEMENT = {
    "bfloat16": "BFLOAT16", "float16": "FLOAT16", "float32": "FLOAT32", "int32": "INT32", "uint8": "UINT8",
    "int8": "UINT8", "int16": "UINT16", "float8_e4m3fn": "UINT8",
}  # fmt: skip
_SCRATCH_PARAMETERS = 2
"""Triton kernels end with two pointers to scratch of the launcher's, which the build refuses to need."""

Address = Callable[[str], int]


class Kernels:
    """Loaded modules: each cubin once, at its first use."""

    def __init__(self, cubins: dict[str, Cubin], read: Callable[[str], bytes]) -> None:
        self.cubins, self.read = cubins, read
        self.modules: list[Any] = []
        self.functions: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """The function handle of a kernel."""
        if name not in self.functions:
            cubin = self.cubins[name]
            module = call("cuModuleLoadData", self.read(cubin.file))
            self.modules.append(module)
            function = call("cuModuleGetFunction", module, cubin.symbol.encode())
            if cubin.shared > _STATIC_SHARED:
                limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                call("cuFuncSetAttribute", function, limit, cubin.shared)
            self.functions[name] = function
        return self.functions[name]

    def close(self) -> None:
        """Unload every module."""
        for module in self.modules:
            call("cuModuleUnload", module)
        self.modules.clear()
        self.functions.clear()


class BoundLaunch:
    """A launch ready to go: its configuration and packed parameters stay alive with it."""

    __slots__ = ("config", "function", "pointers", "storage")

    def __init__(self, launch: Launch, cubin: Cubin, function: Any, address: Address, stream: Any) -> None:
        self.function = function
        self.storage, offsets = pack(launch.args, address)
        base = self.storage.ctypes.data
        self.pointers = np.array([base + offset for offset in offsets], np.uint64)
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = cubin.threads, 1, 1
        config.sharedMemBytes = cubin.shared
        config.hStream = stream
        attributes = []
        if launch.pdl:
            attributes.append(cu.CUlaunchAttribute())
            attributes[-1].id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        if launch.resident:  # all programs at once or none, whatever else runs on the GPU
            attributes.append(cu.CUlaunchAttribute())
            attributes[-1].id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attributes[-1].value.cooperative = 1
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        self.config = config

    def __call__(self) -> None:
        call("cuLaunchKernelEx", self.config, self.function, int(self.pointers.ctypes.data), 0)


def pack(args: Sequence[Any], address: Address) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Parameter storage (64-byte aligned) and each parameter's offset in it."""
    values: list[bytes] = []
    for arg in args:
        match arg:
            case Pointer(name, offset):
                values.append(np.uint64(address(name) + offset).tobytes())
            case Scalar(type_, number):
                values.append(np.array(number, _NUMPY[type_]).tobytes())
            case TensorMap():
                values += tensor_map(arg, address(arg.name) + arg.offset)
    values += [bytes(8)] * _SCRATCH_PARAMETERS
    offsets, size = [], 0
    for value in values:
        size = -(-size // 64) * 64 if len(value) == _MAP_BYTES else size
        offsets.append(size)
        size += -(-len(value) // 8) * 8
    raw = np.zeros(size + 64, np.uint8)
    storage = raw[-raw.ctypes.data % 64 :][:size]
    for offset, value in zip(offsets, values):
        storage[offset : offset + len(value)] = np.frombuffer(value, np.uint8)
    return storage, offsets


def tensor_map(arg: TensorMap, base: int) -> list[bytes]:
    """The descriptor, then extents (i32) and strides in elements (i64), as Triton's kernels take them."""
    size = dtype_bytes(arg.dtype)
    u32, u64 = cu.cuuint32_t, cu.cuuint64_t
    rank = len(arg.shape)
    kind = getattr(cu.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_ELEMENT[arg.dtype]}")
    encoded = call(
        "cuTensorMapEncodeTiled",
        kind,
        rank,
        base,
        [u64(d) for d in reversed(arg.shape)],
        [u64(s) for s in reversed(arg.strides[:-1])],
        [u32(b) for b in reversed(arg.box)],
        [u32(1)] * rank,
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(cu.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{_SWIZZLE[arg.swizzle]}"),
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    words = np.array([int(word) for word in encoded.opaque], np.uint64)
    extents = [np.int32(d).tobytes() for d in arg.shape]
    return [words.tobytes(), *extents, *(np.int64(s // size).tobytes() for s in arg.strides)]


class BoundLaunches:
    """Launches at fixed addresses, in order; ``capture`` turns them into one graph."""

    def __init__(self, launches: Sequence[Launch], kernels: Kernels, address: Address, stream: Any) -> None:
        self.stream = stream
        self.launches = [
            BoundLaunch(launch, kernels.cubins[launch.kernel], kernels.get(launch.kernel), address, stream)
            for launch in launches
        ]
        self.graph: Any = None

    def capture(self) -> None:
        """Record the launches into an executable graph."""
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call("cuStreamBeginCapture", self.stream, mode)
        for launch in self.launches:
            launch()
        graph = call("cuStreamEndCapture", self.stream)
        self.graph = call("cuGraphInstantiate", graph, 0)
        call("cuGraphDestroy", graph)
        call("cuGraphUpload", self.graph, self.stream)

    def run(self) -> None:
        """Enqueue the work."""
        if self.graph is not None:
            call("cuGraphLaunch", self.graph, self.stream)
            return
        for launch in self.launches:
            launch()

    def close(self) -> None:
        """Destroy the graph."""
        if self.graph is not None:
            call("cuGraphExecDestroy", self.graph)
            self.graph = None
