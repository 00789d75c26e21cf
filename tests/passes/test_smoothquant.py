"""smoothquant: exact, and what repairs int8 activations when some channels are far larger than the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt.errors import ConfigError
from llmopt.ir.folding import find_folding
from llmopt.ir.module import Module
from llmopt.report.proof import prove
from tests.calibration.running import calibrated, mlp, windows
from tests.ir.handmade import llama
from tests.passes.running import FUSIONS, logits, rewrites

W8A8: list[tuple[str, dict[str, Any]]] = [("quantize_weights", {"bits": 8}), ("quantize_activations", {})]


def planted(module: Module) -> Module:
    """The same function, with activations a thousand times larger in a few channels of every foldable input."""
    function = module.functions["step"]
    linears = function.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    for source in dict.fromkeys(node.args[0] for node in linears):
        folding = find_folding(source)
        if folding is not None:
            factor = torch.ones(int(source.meta["val"].shape[-1]))
            factor[3::29] = 1000.0
            folding.apply(module, function, folding.tie(factor))
    return module


def kl(module: Module, folder: Path, *passes: Any) -> float:
    calibrated(module, folder, *passes, *W8A8)
    return float(prove(mlp(), module, windows(4, 33, seed=8), lambda *_: None)["baseline"]["kl_mean"])


@pytest.mark.parametrize("make", [mlp, lambda: llama(2)])
@pytest.mark.parametrize("fused", [False, True])
def test_smoothing_changes_no_logit(make: Any, fused: bool, tmp_path: Path) -> None:
    module = make()
    exact = logits(module)
    records = calibrated(module, tmp_path, *(FUSIONS if fused else ()), ("smoothquant", {"alpha": 0.7}))
    assert records[-1].rewrites == (8 if make is not mlp else 4)
    torch.testing.assert_close(logits(module), exact, rtol=1e-4, atol=1e-5)


def test_a_bf16_module_stays_bf16(tmp_path: Path) -> None:
    module = llama(2, dtype=torch.bfloat16)
    exact = logits(module).float()
    calibrated(module, tmp_path, "smoothquant", ("gptq", {"bits": 8, "group_size": None}))
    assert module.weights["layers.0.attn.q_proj.weight.codes"].dtype == torch.uint8
    assert float((logits(module).float() - exact).norm() / exact.norm()) < 0.05


def test_planted_outliers_break_int8_activations_and_smoothing_repairs_them(tmp_path: Path) -> None:
    torch.testing.assert_close(logits(planted(mlp())), logits(mlp()), rtol=1e-3, atol=1e-4)
    clean, naive = kl(mlp(), tmp_path / "a"), kl(planted(mlp()), tmp_path / "b")
    repaired = kl(planted(mlp()), tmp_path / "c", "smoothquant")
    assert naive > 20 * clean
    assert repaired < 3 * clean


def test_must_not_fire_where_the_input_has_other_readers(tmp_path: Path) -> None:
    module = mlp(layers=1)
    assert calibrated(module, tmp_path, ("smoothquant", {"exclude": ["*.up_proj"]}))[-1].rewrites == 1


def test_alpha_is_a_share() -> None:
    with pytest.raises(ConfigError, match="alpha is between 0 and 1, not 2"):
        rewrites(mlp(), ("smoothquant", {"alpha": 2.0}))
