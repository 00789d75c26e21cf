"""What the built-in tables say a linear of one row takes: for the choice of precision, which asks before a build."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from . import Table, linear_key, quantized_form
from .table import load_table

ARCH = 90
"""The architecture that is asked for: the only one with a table."""

KERNELS = ("gemv", "gemm", "gemm_q", "gemv_q")
JOINED = ("", "gated", "normed", "gated normed")


def linear_us(n: int, k: int, dtype: str, bits: int | None, group: int) -> float | None:
    """Microseconds of the fastest kernel measured on exactly this shape, whatever was joined to it; None without."""
    form = dtype if bits is None else quantized_form({"format": "int", "bits": bits, "block_k": group}, k)
    keys = [linear_key(form, 1, n, k, joined) for joined in JOINED]
    found = [table()[kernel][key].get("us") for kernel in KERNELS for key in keys if key in table().get(kernel, {})]
    return min((us for us in found if us is not None), default=None)


@cache
def table() -> Table:
    """Entries of the compiler at hand, or of the nearest one that was measured."""
    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "0"
    return load_table(ARCH, f"triton {compiler}").table
