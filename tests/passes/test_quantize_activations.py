"""quantize_activations: fires once an input, equals rounding by hand, static scales from calibration, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.errors import PassError
from llmopt.ir.feed import run_sequence
from llmopt.ir.ops.rounding import LIMITS
from llmopt.ir.pass_manager import PassManager
from llmopt.report.proof import prove
from llmopt.target import TargetInfo
from tests.calibration.running import Builder, calibrated, mlp, windows
from tests.passes.running import TOKENS, build, context, logits, ops, rewrites, run, text

INT8: tuple[str, dict[str, Any]] = ("quantize_weights", {"bits": 8})
round_activations = torch.ops.llmopt.round_activations


def grid(format: str) -> torch.Tensor:
    """Every value of a format's codes."""
    if format == "int8":
        return torch.arange(-127.0, 128.0)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("format", LIMITS)
def test_rounding_takes_the_nearest_code(format: str, static: bool) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    x[0, 2] = 0.0
    scale = torch.tensor([1.5 / LIMITS[format]]) if static else None
    found = round_activations(x, scale, format)
    used = scale if static else x.abs().amax(-1, keepdim=True) / LIMITS[format]
    used = torch.where(used == 0, 1.0, used)
    nearest = grid(format)[((x / used)[..., None] - grid(format)).abs().argmin(-1)] * used
    assert float(((found - x).abs() - (nearest - x).abs()).abs().max()) < 1e-5
    assert found.dtype == x.dtype
    assert round_activations(x.bfloat16(), scale, format).dtype == torch.bfloat16


def test_linears_of_one_input_share_its_rounding() -> None:
    module = mlp(layers=1)
    assert rewrites(module, INT8, "quantize_activations") == 2
    assert ops(module).count("llmopt.round_activations") == 2
    assert ops(module).count("llmopt.linear_q") == 3


def test_equals_rounding_by_hand() -> None:
    module = mlp(layers=1)
    run(module, INT8, "quantize_activations")
    made = logits(module)
    seen: list[torch.Tensor] = []
    run_sequence(module, "step", TOKENS, observe=lambda n, v: seen.append(v) if "round" in n.name else None)
    for value in seen:
        codes = value / (value.abs().amax(-1, keepdim=True) / 127)
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    exact = mlp(layers=1)
    run(exact, INT8)
    assert 0 < float((made - logits(exact)).abs().max()) < 0.05 * float(made.abs().max())


def test_static_scales_are_the_largest_of_the_text(tmp_path: Path) -> None:
    module = mlp(layers=1)
    calibrated(module, tmp_path, INT8, ("quantize_activations", {"scale": "tensor"}))
    exact, largest = mlp(layers=1), 0.0
    run(exact, INT8)
    for window in windows():
        seen: dict[str, torch.Tensor] = {}
        run_sequence(exact, "step", window.tolist(), observe=lambda n, v, s=seen: s.__setitem__(n.name, v))
        largest = max(largest, float(seen["rms_norm_default"].abs().max()))
    scale = float(module.weights["layers.0.gate_proj.weight.input_scale"].tensor())
    assert scale == pytest.approx(largest / 127)


def test_golden_text() -> None:
    b = Builder()
    module = b.finish(b.linear(b.linear(b.embed(32), "a", 32), "lm_head", 17))
    run(module, INT8, "quantize_activations")
    assert_expected_inline(
        text(module),
        """\
step(
  %input_ids : i64[1, T],
  %position_ids : i64[1, T],
) {
  #
  %embedding_0 : f32[1, T, 32] = aten.embedding(@embed.weight, %input_ids)
  %round_activations_0 : f32[1, T, 32] = llmopt.round_activations(%embedding_0, None, int8)
  %linear_q_0 : f32[1, T, 32] = llmopt.linear_q(%round_activations_0, @a.weight.codes, @a.weight.scales, None, None, None, int, 8, 1, 32)
  %linear_0 : f32[1, T, 17] = aten.linear(%linear_q_0, @lm_head.weight)
  return (%linear_0)
}
""",  # noqa: E501
    )


def test_must_not_fire_on_plain_linears_or_excluded_ones() -> None:
    assert rewrites(mlp(layers=1), "quantize_activations") == 0
    assert rewrites(mlp(layers=1), INT8, ("quantize_activations", {"exclude": ["*.down_proj"]})) == 1
    with pytest.raises(PassError, match="pattern 'x' matches no layer"):
        run(mlp(layers=1), INT8, ("quantize_activations", {"exclude": ["x"]}))


def test_a_target_without_it_is_refused() -> None:
    ctx = replace(context(), target=TargetInfo("t", quant_bits=(8,)))
    with pytest.raises(PassError, match="target t does not round activations to int8"):
        PassManager().run(mlp(), [build(INT8), build("quantize_activations")], ctx)
    with pytest.raises(PassError, match="no calibration text"):
        run(mlp(), INT8, ("quantize_activations", {"scale": "tensor"}))


def test_the_proof_counts_the_error_of_activations() -> None:
    weights, both = mlp(layers=1), mlp(layers=1)
    run(weights, INT8)
    run(both, INT8, "quantize_activations")
    tokens = windows(2, 17)
    errors = [
        [layer["output_error"] for layer in prove(mlp(layers=1), m, tokens, lambda *_: None)["layers"]]
        for m in (weights, both)
    ]
    assert all(b > a for a, b in zip(*errors))
