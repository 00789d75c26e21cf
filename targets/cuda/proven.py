"""Which kernels have run on a GPU, by architecture; the others are built and never were run."""

from __future__ import annotations

from collections.abc import Iterable

from .kernel import Specialization

RUN_ON = {90: "NVIDIA H200"}
"""By architecture, where ``make test-gpu`` has passed."""
NEVER_RUN = ("gemm_q", "gemm_w8a8", "gemm_w8a8_persistent", "gemv_w8a8", "moe_q", "rounding")
"""Files of kernels/ that came after that."""
CODES = ("*i8", "*u8", "*fp8e4nv")
"""Pointers that older kernels took only since then: to codes of keys and values, of activations, of tables."""


def has_run(specialization: Specialization) -> bool:
    """Whether its kernel has run on a GPU of RUN_ON, in this form or a like one."""
    types = {type_ for _, type_ in specialization.signature}
    file = specialization.module.rpartition(".")[2]
    return file not in NEVER_RUN and specialization.function != "take_rows_q" and types.isdisjoint(CODES)


def proven(arch: int, specializations: Iterable[Specialization]) -> str:
    """What the manifest says of an architecture's kernels."""
    if arch not in RUN_ON:
        return "built, never run"
    left = sorted({s.function for s in specializations if not has_run(s)})
    return f"run on {RUN_ON[arch]}" + (f", but for {', '.join(left)}: built, never run" if left else "")
