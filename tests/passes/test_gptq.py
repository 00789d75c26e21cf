"""gptq: less output error than rounding, equal to rounding on uncorrelated inputs, resumable, strict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.errors import ConfigError, PassError
from llmopt.ir.module import Module
from llmopt.ir.quant import QuantTensor, RoundToNearest, Scheme
from llmopt.ir.weights import Constant
from llmopt.report.proof import OutputErrors, logits_of
from passes.gptq import solve
from tests.calibration.running import Builder, calibrated, mlp, windows
from tests.passes.running import run, text

G32 = {"bits": 4, "group_size": 32}


def tensors(w: torch.Tensor, x: torch.Tensor, scheme: Scheme, **options: Any) -> tuple[QuantTensor, QuantTensor]:
    """GPTQ's and round-to-nearest's form of w (N, K) for inputs x (T, K)."""
    given = {"act_order": True, "static_groups": True, "damp": 0.01} | options
    parts = {name: Constant(part) for name, part in solve(w, x.T @ x, scheme, **given).items()}
    made = QuantTensor(parts["codes"], parts["scales"], parts.get("zeros"), parts.get("g_idx"), scheme)
    plain = Scheme(scheme.format, scheme.bits, 1, scheme.block_k, scheme.symmetric)
    return made, RoundToNearest("w", Constant(w), plain).tensor()


def correlated(rows: int = 600, width: int = 128, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing


W = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))


def error(tensor: QuantTensor, x: torch.Tensor) -> float:
    return float((x @ (tensor.dequantize() - W).T).pow(2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("act_order", "static_groups"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 128)])
def test_less_error_than_rounding_on_inputs_it_never_saw(
    bits: int, group: int, act_order: bool, static_groups: bool, symmetric: bool
) -> None:
    permuted = act_order and not static_groups and group < 128
    scheme = Scheme("int", bits, 1, group, symmetric, permuted=permuted)
    x = correlated(1200)
    made, plain = tensors(W, x[:600], scheme, act_order=act_order, static_groups=static_groups)
    assert error(made, x[600:]) < 0.75 * error(plain, x[600:])
    assert int(made.codes.tensor().max()) < 2**bits
    assert (made.g_idx is not None) == permuted


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_correlations_it_is_rounding(symmetric: bool) -> None:
    made, plain = tensors(W, torch.eye(128), Scheme("int", 4, 1, 32, symmetric))
    for part in ("codes", "scales", "zeros"):
        a, b = getattr(made, part), getattr(plain, part)
        assert (a is None and b is None) or torch.equal(a.tensor(), b.tensor())


def test_shuffled_activations_teach_nothing() -> None:
    """The negative control: channels mixed up keep their sizes and lose what GPTQ lives on."""
    x = correlated(1200)
    shuffled = torch.stack(
        [x[torch.randperm(600, generator=torch.Generator().manual_seed(i)), i] for i in range(128)], 1
    )
    made, plain = tensors(W, shuffled, Scheme("int", 4, 1, 32))
    assert error(made, x[600:]) > 0.9 * error(plain, x[600:])


def test_a_channel_that_is_never_active_keeps_its_rounding() -> None:
    x = correlated()
    x[:, 7] = 0.0
    made, plain = tensors(W, x, Scheme("int", 4, 1, 32))
    assert torch.equal(made.codes.tensor()[:, 7], plain.codes.tensor()[:, 7])


def test_a_hessian_without_rank_is_damped() -> None:
    made, _ = tensors(W, correlated(3), Scheme("int", 4, 1, 32))
    assert bool(made.dequantize().isfinite().all())


def losses(module: Module) -> dict[str, float]:
    errors = OutputErrors(module)
    for window in windows(4, seed=9):
        logits_of(module, window[None], errors.observe)
    return {layer["name"]: layer["output_error"] for layer in errors.layers()}


def test_every_linear_of_a_model_errs_less_than_rounded(tmp_path: Path) -> None:
    plain, made = mlp(), mlp()
    run(plain, ("quantize_weights", G32))
    assert calibrated(made, tmp_path, ("gptq", G32))[-1].rewrites == 6
    rounded, found = losses(plain), losses(made)
    assert rounded.keys() == found.keys()
    assert all(found[name] < rounded[name] for name in found)


def test_an_interrupted_build_is_finished_with_the_same_codes(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    ran: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        assert total == 4 * 6
        if done == 15 and max(ran) < 100:
            raise Stop
        ran.append(done)

    module = mlp()
    with pytest.raises(Stop):
        calibrated(module, tmp_path / "a", ("gptq", G32), progress=progress)
    first, resumed, whole = len(ran), mlp(), mlp()
    ran.append(100)
    calibrated(resumed, tmp_path / "a", ("gptq", G32), progress=progress)
    assert first > 0
    assert ran[first + 1] == 13  # the third of four groups, whose activations were not whole
    calibrated(whole, tmp_path / "b", ("gptq", G32))
    for name, weight in whole.weights.items():
        assert torch.equal(weight.tensor(), resumed.weights[name].tensor())


def test_other_options_do_not_take_up_each_others_results(tmp_path: Path) -> None:
    fine, coarse = mlp(), mlp()
    calibrated(fine, tmp_path, ("gptq", G32))
    calibrated(coarse, tmp_path, ("gptq", {"bits": 3, "group_size": 32}))
    assert int(coarse.weights["layers.0.up_proj.weight.codes"].tensor().max()) == 7


def test_golden_text(tmp_path: Path) -> None:
    b = Builder()
    module = b.finish(b.linear(b.linear(b.embed(64), "a", 64), "lm_head", 17))
    calibrated(module, tmp_path, ("gptq", {**G32, "static_groups": False}))
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
) {
  #
  %embedding_0 : f32[1, T, 64] = aten.embedding(@embed.weight, %input_ids)
  %linear_q_0 : f32[1, T, 64] = llmopt.linear_q(%embedding_0, @a.weight.codes, @a.weight.scales, None, None, @a.weight.g_idx, int, 4, 1, 32)
  %linear_0 : f32[1, T, 17] = aten.linear(%linear_q_0, @lm_head.weight)
  return (%linear_0)
}
""",  # noqa: E501
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 128}, "group_size 128 does not divide its 64 input features"),
        ({"bits": 9}, "target reference has no 9-bit weights"),
        ({"group_size": 32, "include": ["nothing"]}, "pattern 'nothing' matches no layer"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        calibrated(mlp(), tmp_path, ("gptq", options))


def test_a_damping_that_is_no_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="damp is a share between 0 and 1"):
        calibrated(mlp(), tmp_path, ("gptq", {"damp": 2.0}))
