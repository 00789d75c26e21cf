"""Calibrated int4 on a trained model: less KL than rounding to nearest, beyond the interval of a paired bootstrap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.quality import plant
from llmopt.frontend import capture, load_checkpoint
from llmopt.ir.module import Module
from llmopt.ir.rewrite import copy_module
from llmopt.report.accuracy import Doubles, block_bootstrap, kl_divergence, mean
from llmopt.report.proof import OutputErrors, logits_of
from tests.calibration.running import calibrated
from tests.e2e.classics import calibration_windows, held_out_windows
from tests.passes.running import FUSIONS, run

MODEL = "classics-14m"
G128: dict[str, Any] = {"bits": 4, "group_size": 128}
EXPERTS: dict[str, Any] = {"experts": True}
SCHEMES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "rounded": [("quantize_weights", G128)],
    "gptq": [("gptq", G128)],
    "awq": [("awq", G128), ("quantize_weights", G128)],
    "one scale a channel": [("quantize_weights", {"bits": 4})],
    "experts rounded": [("quantize_weights", G128 | EXPERTS)],
    "experts gptq": [("gptq", G128 | EXPERTS)],
    "experts awq": [("awq", G128 | EXPERTS), ("quantize_weights", G128 | EXPERTS)],
    "experts int8": [("quantize_weights", EXPERTS)],
    "experts W8A8": [("quantize_weights", EXPERTS), ("quantize_activations", {})],
    "experts smoothed W8A8": [("smoothquant", EXPERTS), ("quantize_weights", EXPERTS), ("quantize_activations", {})],
}


class Quality:
    """KL of schemes from fp32 on held-out windows, (windows, tokens); each is made and computed once."""

    def __init__(self, shared: Path, folder: Path, model: str = MODEL, windows: int = 6, calibration: int = 16) -> None:
        self.checkpoint, self.folder = shared / "models" / model, folder
        self.windows = torch.from_numpy(held_out_windows(shared, model)[:windows])
        self.tokens = calibration_windows(shared, model, calibration)
        self.fused = capture(load_checkpoint(self.checkpoint), torch.float32, 512).module
        run(self.fused, *FUSIONS)
        self.exact = self.run(self.module([]))
        self.known: dict[str, Doubles] = {}
        self.made: dict[str, Module] = {}

    def module(self, passes: list[tuple[str, dict[str, Any]]], planted: bool = False) -> Module:
        module = copy_module(self.fused)
        if planted:
            plant(module)
        calibrated(module, self.folder, *passes, tokens=self.tokens)
        return module

    def run(self, module: Module) -> list[Tensor]:
        return logits_of(module, self.windows)

    def scheme(self, name: str, planted: bool = False) -> Module:
        if name not in self.made:
            self.made[name] = self.module(SCHEMES[name], planted)
        return self.made[name]

    def kl(self, scheme: str, planted: bool = False) -> Doubles:
        if scheme not in self.known:
            made = self.run(self.scheme(scheme, planted))
            rows = [kl_divergence(a.numpy(), b.numpy()) for a, b in zip(self.exact, made)]
            self.known[scheme] = np.stack(rows)
        return self.known[scheme]

    def output_errors(self, scheme: str) -> dict[str, float]:
        """Of each linear, on two windows."""
        errors = OutputErrors(self.scheme(scheme))
        for window in self.windows[:2]:
            logits_of(self.scheme(scheme), window[None], errors.observe)
        return {layer["name"]: layer["output_error"] for layer in errors.layers()}


# What the tests of a model share is computed once, by one worker.
DENSE, MIXED = (pytest.mark.xdist_group(f"quality of {name}") for name in ("one model", "experts"))


@pytest.fixture(scope="module")
def quality(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Quality:
    return Quality(shared, tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def experts(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Quality:
    return Quality(shared, tmp_path_factory.mktemp("experts"), "classics-moe-12m", windows=3, calibration=8)


@pytest.mark.slow
@MIXED
@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_experts_are_better_than_rounded_to_nearest(experts: Quality, scheme: str) -> None:
    difference = block_bootstrap(experts.kl(f"experts {scheme}") - experts.kl("experts rounded"), mean)
    assert difference.high < 0
    assert experts.kl("experts int8").mean() < 0.05 * experts.kl("experts rounded").mean()


@pytest.mark.slow
@MIXED
def test_planted_outliers_of_experts_are_smoothed(experts: Quality) -> None:
    broken, repaired = (experts.kl(f"experts {name}", planted=True).mean() for name in ("W8A8", "smoothed W8A8"))
    assert broken > 0.2
    assert repaired < 0.01


@pytest.mark.slow
@DENSE
@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_better_than_rounding_to_nearest(quality: Quality, scheme: str) -> None:
    difference = block_bootstrap(quality.kl(scheme) - quality.kl("rounded"), mean)
    assert difference.high < 0
    assert quality.kl(scheme).mean() < 0.85 * quality.kl("rounded").mean()


@pytest.mark.slow
@DENSE
def test_every_linear_errs_less_than_rounded(quality: Quality) -> None:
    rounded, found = (quality.output_errors(scheme) for scheme in ("rounded", "gptq"))
    assert len(found) == 32
    assert all(found[name] < rounded[name] for name in rounded)


@pytest.mark.slow
@DENSE
def test_the_comparison_finds_worse_schemes_worse(quality: Quality) -> None:
    difference = block_bootstrap(quality.kl("one scale a channel") - quality.kl("rounded"), mean)
    assert difference.low > 0


@pytest.mark.slow
@DENSE
def test_chosen_precision_beats_the_uniform_scheme_of_its_size(quality: Quality) -> None:
    uniform = quality.module([("quantize_weights", {"bits": 4, "group_size": 32})])
    size = sum(w.nbytes / (2 if name.endswith(".codes") else 1) for name, w in uniform.weights.items())
    options = {"bits": [3, 4, 5, 6], "group_sizes": [32, 128], "windows": 1, "size": f"{size / 1e6:.4f}MB"}
    chosen = quality.module([("choose_precision", options), ("quantize_weights", {"bits": 8})])
    assert chosen.notes["choose_precision"]["bytes"] <= size
    made = [quality.run(module) for module in (chosen, uniform)]
    kl = [np.stack([kl_divergence(a.numpy(), b.numpy()) for a, b in zip(quality.exact, rows)]) for rows in made]
    assert block_bootstrap(kl[0] - kl[1], mean).high < 0
