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
GROUPS = (32, 64, 128, 256)
SCALE_BITS = 16


def linear_us(n: int, k: int, dtype: str, bits: int | None, group: int) -> float | None:
    """Microseconds of the fastest kernel measured on exactly this shape, whatever was joined to it; None without.

    Of codes in groups that were not measured: what another group of as many bits takes, by the bytes of both.
    """
    if bits is None:
        return fastest(dtype, n, k)
    found = {size: us for size in {group, *GROUPS, k} if (us := fastest(form_of(bits, size, k), n, k)) is not None}
    near = min(found, key=lambda size: (size != group, abs(size - group)), default=None)
    return None if near is None else found[near] * (bits + SCALE_BITS / group) / (bits + SCALE_BITS / near)


def form_of(bits: int, group: int, k: int) -> str:
    """A key's words for integers."""
    return quantized_form({"format": "int", "bits": bits, "block_k": group}, k)


def fastest(form: str, n: int, k: int) -> float | None:
    """Microseconds of the fastest kernel of a form and shape; None when none was measured."""
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
