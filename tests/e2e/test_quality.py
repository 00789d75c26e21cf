"""Calibrated int4 on a trained model: less KL than rounding to nearest, beyond the interval of a paired bootstrap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt.frontend import capture, load_checkpoint
from llmopt.ir.module import Module
from llmopt.report.accuracy import Doubles, block_bootstrap, kl_divergence, mean
from llmopt.report.proof import logits
from tests.calibration.running import calibrated
from tests.e2e.classics import calibration_windows, held_out_windows
from tests.passes.running import FUSIONS

MODEL = "classics-14m"
G128: dict[str, Any] = {"bits": 4, "group_size": 128}
SCHEMES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "rounded": [("quantize_weights", G128)],
    "gptq": [("gptq", G128)],
    "awq": [("awq", G128), ("quantize_weights", G128)],
    "one scale a channel": [("quantize_weights", {"bits": 4})],
}


class Quality:
    """KL of schemes from fp32 on held-out windows, (windows, tokens), each computed once."""

    def __init__(self, shared: Path, folder: Path) -> None:
        self.checkpoint, self.folder = shared / "models" / MODEL, folder
        self.windows = torch.from_numpy(held_out_windows(shared, MODEL)[:6])
        self.tokens = calibration_windows(shared, MODEL, 16)
        self.exact = self.run(self.module([]))
        self.known: dict[str, Doubles] = {}

    def module(self, passes: list[tuple[str, dict[str, Any]]]) -> Module:
        module = capture(load_checkpoint(self.checkpoint), torch.float32, 512).module
        calibrated(module, self.folder, *FUSIONS, *passes, tokens=self.tokens)
        return module

    def run(self, module: Module) -> list[Tensor]:
        return [logits(module, window) for window in self.windows]

    def kl(self, scheme: str) -> Doubles:
        if scheme not in self.known:
            made = self.run(self.module(SCHEMES[scheme]))
            rows = [kl_divergence(a.numpy(), b.numpy()) for a, b in zip(self.exact, made)]
            self.known[scheme] = np.stack(rows)
        return self.known[scheme]


@pytest.fixture(scope="module")
def quality(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Quality:
    return Quality(shared, tmp_path_factory.mktemp("calibration"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_better_than_rounding_to_nearest(quality: Quality, scheme: str) -> None:
    difference = block_bootstrap(quality.kl(scheme) - quality.kl("rounded"), mean)
    assert difference.high < 0
    assert quality.kl(scheme).mean() < 0.85 * quality.kl("rounded").mean()


@pytest.mark.slow
def test_the_comparison_finds_worse_schemes_worse(quality: Quality) -> None:
    difference = block_bootstrap(quality.kl("one scale a channel") - quality.kl("rounded"), mean)
    assert difference.low > 0


@pytest.mark.slow
def test_chosen_precision_beats_the_uniform_scheme_of_its_size(quality: Quality) -> None:
    uniform = quality.module([("quantize_weights", {"bits": 4, "group_size": 32})])
    size = sum(w.nbytes / (2 if name.endswith(".codes") else 1) for name, w in uniform.weights.items())
    options = {"bits": [3, 4, 5, 6], "group_sizes": [32, 128], "windows": 1, "size": f"{size / 1e6:.4f}MB"}
    chosen = quality.module([("choose_precision", options), ("quantize_weights", {"bits": 8})])
    assert chosen.notes["choose_precision"]["bytes"] <= size
    made = [quality.run(module) for module in (chosen, uniform)]
    kl = [np.stack([kl_divergence(a.numpy(), b.numpy()) for a, b in zip(quality.exact, rows)]) for rows in made]
    assert block_bootstrap(kl[0] - kl[1], mean).high < 0
