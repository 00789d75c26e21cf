"""Calibration sequences as passes see them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Calibration:
    """Token windows (n, length) int64 to run through the model, and the folder that keeps what was computed.

    ``folder`` makes a build resumable: statistics and activations in it are taken up again by a run with an equal
    ``key`` (a digest of everything the results depend on but the pass itself). Weights that passes leave behind read
    from it until the artifact is written. ``device``: where it runs; what is kept is files, which know no device.
    """

    windows: Tensor
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="llmopt-calibration-")))
    key: str = ""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    device: torch.device = CPU
