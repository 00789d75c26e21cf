"""Which architectures' kernels have run on a GPU; cubins of the others are built and never were run."""

from __future__ import annotations

from collections.abc import Iterable

RUN_ON = {90: "NVIDIA H200"}
"""By architecture, where ``make test-gpu`` has passed."""


def proven(archs: Iterable[int]) -> dict[str, str]:
    """What the manifest says of each architecture."""
    return {f"sm_{arch}": f"run on {RUN_ON[arch]}" if arch in RUN_ON else "built, never run" for arch in archs}
