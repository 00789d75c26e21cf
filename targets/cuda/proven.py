"""Which kernels have run on a GPU, by architecture; the others are built and never were run."""

from __future__ import annotations

from collections.abc import Iterable

from .kernel import Specialization

RUN_ON = {90: "NVIDIA H200"}
"""By architecture, where ``make test-gpu`` has passed."""
NEVER_RUN: tuple[str, ...] = ()
"""Files of kernels/ that came after that."""


def has_run(specialization: Specialization) -> bool:
    """Whether its kernel has run on a GPU of RUN_ON, in this form or a like one."""
    return specialization.module.rpartition(".")[2] not in NEVER_RUN


def proven(arch: int, specializations: Iterable[Specialization]) -> str:
    """What the manifest says of an architecture's kernels."""
    if arch not in RUN_ON:
        return "built, never run"
    left = sorted({s.function for s in specializations if not has_run(s)})
    return f"run on {RUN_ON[arch]}" + (f", but for {', '.join(left)}: built, never run" if left else "")
