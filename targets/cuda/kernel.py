"""What a kernel file offers the cuda target: which calls it serves, and the launches that serve one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llmopt.program import OpCall, TensorType


@dataclass(frozen=True)
class Strided:
    """Where a value lies: ``buffer`` is a weight, input, state or arena buffer; strides and offset in elements."""

    buffer: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def contiguous(self) -> bool:
        """Whether the elements are dense in row-major order."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides)):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True


@dataclass(frozen=True)
class Scratch:
    """A buffer that lives during one call. ``zeroed`` buffers are zero at first launch and left zero by the kernel."""

    name: str
    bytes: int
    zeroed: bool = False


@dataclass(frozen=True)
class TmaOperand:
    """A TMA descriptor over ``value`` (2-D, or flattened to 2-D by the kernel): box in elements, swizzle bytes.

    ``spare``: the kernel reads whole boxes and does not use rows past the last. A descriptor of whole boxes is faster
    where memory allows it: on an H200 a linear of 192 rows in boxes of 128 takes 34 us with one that ends at the last
    row and 17 with one that ends at the last box, which is what 256 rows take.
    """

    value: Strided
    box: tuple[int, ...]
    swizzle: int = 128
    spare: bool = False

    def whole(self) -> Strided:
        """The value, where rows are to spare as whole boxes."""
        rows = -(-self.value.shape[0] // self.box[0]) * self.box[0]
        return replace(self.value, shape=(rows, *self.value.shape[1:])) if self.spare else self.value


@dataclass(frozen=True)
class Specialization:
    """One cubin: a jitted function with everything the compiler must know.

    ``signature``: Triton type of each runtime parameter in order (``*bf16``, ``i32``, ``fp32``, …); pointers are
    16-byte aligned unless named in ``unaligned``. ``constexprs``: compile-time parameters. ``source``: file of
    CUDA C++ beside the module that describes the function, with ``shared`` bytes of memory; constexprs are its macros,
    and ``registers`` those of a thread at most where programs must fit beside each other, 0 for as many as there are.
    """

    module: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = False
    unaligned: tuple[str, ...] = ()
    registers: int = 0
    source: str = ""
    shared: int = 0


Argument = Strided | Scratch | TmaOperand | int | float


@dataclass(frozen=True)
class KernelLaunch:
    """A launch in terms of the call's values: ``args`` follow the specialization's signature; ``resident`` as in the
    runtime's Launch."""

    specialization: Specialization
    grid: tuple[int, int, int]
    args: tuple[Argument, ...]
    bytes: int = 0
    resident: bool = False


@dataclass(frozen=True)
class CallSite:
    """A call inside a bucket: values by argument name, outputs in order, every extent resolved to integers.

    ``values``: Strided for a tensor (views already folded into strides and offset), int for a dimension expression,
    the dtype's name for a dtype, tuples of these, otherwise the argument as it is in the program. States are
    (B, Hk, S, D) dense with B their upper bound, not their real extent; in-place results (the states of a kv write)
    come as outputs in the same buffer. ``dims``: the bucket's extents (T rows, N sequences, M logit rows, W table
    width, …); rows past the real ones have slot -1, sequences past the real ones seq_lens 0 and cu_seqlens repeated.
    ``types``: of the call's own values. ``function``: ``decode`` (one row a sequence: T = N = M, row i is
    sequence i) or ``extend``. Calls that differ only in buffer names are asked about once, so a selection must not
    depend on names. ``tuning``: measured configuration by (kernel, shape key), empty when the arch has none.
    """

    call: OpCall
    types: Mapping[str, TensorType]
    values: Mapping[str, Any]
    outputs: tuple[Strided, ...]
    dims: Mapping[str, int]
    function: str
    arch: int
    tuning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """Launches that serve a call, the reason this kernel was chosen, and its modelled or measured microseconds."""

    launches: tuple[KernelLaunch, ...]
    reason: str
    cost_us: float


class Kernel(Protocol):
    """One kernels/<op>.py exposes ``KERNEL``. ``ops``: the op names it can serve."""

    name: str
    ops: tuple[str, ...]

    def select(self, site: CallSite) -> Selection | str:
        """The launches for a call, or one line saying why this kernel does not serve it."""
        ...
