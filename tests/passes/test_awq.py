"""awq: scales fold exactly, errors shrink where channels are uneven, clipping helps, tiny groups are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt.calibration.rounding import best_limits, rounded
from llmopt.ir.module import Module
from llmopt.ir.quant import Scheme
from llmopt.ir.weights import Constant, Scaled
from llmopt.report.proof import logits_of
from tests.calibration.running import Builder, calibrated, mlp, windows
from tests.ir.handmade import llama
from tests.passes.running import FUSIONS, logits, run

G32: dict[str, Any] = {"bits": 4, "group_size": 32}


def uneven() -> Module:
    """A norm that makes a few channels far larger than the others, as trained models do."""
    b = Builder()
    x = b.embed(64)
    h = b.rms_norm(x, "norm")
    hidden = b.linear(h, "up", 64)
    module = b.finish(b.linear(b.rms_norm(hidden, "last"), "lm_head", 17))
    gain = torch.ones(64)
    gain[::9] = 40.0
    module.weights["norm.weight"] = Constant(gain - 1)  # the builder's norms add one
    return module


def loss(module: Module, exact: Module) -> float:
    tokens = windows(1, seed=5)[0]
    return float((logits_of(module, tokens[None])[0] - logits_of(exact, tokens[None])[0]).pow(2).mean())


def test_scales_change_no_logit_and_clipping_does(tmp_path: Path) -> None:
    module, exact = uneven(), logits(uneven())
    assert calibrated(module, tmp_path / "a", ("awq", {**G32, "clip": False}))[-1].rewrites == 1
    assert isinstance(module.weights["up.weight"], Scaled)
    torch.testing.assert_close(logits(module), exact, rtol=1e-4, atol=1e-5)
    calibrated(clipped := uneven(), tmp_path / "b", ("awq", G32))
    assert float((logits(clipped) - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("make", [mlp, lambda: llama(2)])
def test_scales_of_whole_blocks_change_no_logit(make: Any, tmp_path: Path) -> None:
    module = make()
    exact = logits(module)
    calibrated(module, tmp_path, *FUSIONS, ("awq", {"group_size": None, "clip": False}))
    torch.testing.assert_close(logits(module), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_uneven_channels_err_less(tmp_path: Path, symmetric: bool) -> None:
    options = {**G32, "symmetric": symmetric}
    plain, scaled, clipped = uneven(), uneven(), uneven()
    run(plain, ("quantize_weights", options))
    calibrated(scaled, tmp_path / "a", ("awq", {**options, "clip": False}), ("quantize_weights", options))
    calibrated(clipped, tmp_path / "b", ("awq", options), ("quantize_weights", options))
    assert loss(scaled, uneven()) < 0.8 * loss(plain, uneven())
    assert loss(clipped, uneven()) < 0.6 * loss(plain, uneven())


def test_an_input_that_cannot_be_scaled_is_only_clipped(tmp_path: Path) -> None:
    b = Builder()
    h = b.embed(64)
    module = b.finish(b.linear(b.linear(h, "a", 64), "lm_head", 17))
    assert calibrated(module, tmp_path / "a", ("awq", {**G32, "clip": False}))[-1].rewrites == 0
    assert calibrated(module, tmp_path / "b", ("awq", G32))[-1].rewrites == 1


def test_limits_never_err_more_than_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(32, 128, generator=generator), torch.randn(300, 128, generator=generator) + 1.0
    scheme = Scheme("int", 4, 1, 32)
    gram = x.T @ x

    def error(change: torch.Tensor) -> torch.Tensor:
        return ((change @ gram) * change).sum(-1)

    limits = best_limits(gram, w, scheme).repeat_interleave(32, 1)
    found, plain = rounded(w.clamp(-limits, limits), scheme) - w, rounded(w, scheme) - w
    assert bool((error(found) <= error(plain) * (1 + 1e-5)).all())
    assert float(error(found).sum()) < 0.7 * float(error(plain).sum())
    blind = best_limits(torch.eye(128), w, scheme).repeat_interleave(32, 1)
    assert float(error(rounded(w.clamp(-blind, blind), scheme) - w).sum()) > 1.1 * float(error(found).sum())


def test_an_interrupted_build_is_finished_with_the_same_weights(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    stops = {15}

    def progress(what: str, done: int, total: int) -> None:
        if done in stops:
            raise Stop

    with pytest.raises(Stop):
        calibrated(mlp(), tmp_path / "a", ("awq", G32), progress=progress)
    stops.clear()
    resumed, whole = mlp(), mlp()
    calibrated(resumed, tmp_path / "a", ("awq", G32), progress=progress)
    calibrated(whole, tmp_path / "b", ("awq", G32))
    for name, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name].tensor(), weight.tensor(), rtol=0, atol=0)
