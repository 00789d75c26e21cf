"""set_precision: layers by pattern, the later of two that overlap counts, every quantizer follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmopt.errors import ConfigError, PassError
from llmopt.ir.module import Module
from llmopt.recipe import build_pass, parse_recipe
from tests.calibration.running import calibrated, mixture, mlp
from tests.passes.running import logits, run

Options = dict[str, Any]
G32: Options = {"bits": 4, "group_size": 32}
DOWN: tuple[str, Options] = ("set_precision", {"bits": 8, "group_size": 64, "include": ["*.down_proj"]})
FIRST: tuple[str, Options] = ("set_precision", {"bits": 3, "group_size": 32, "include": ["layers.0.*"]})


def formats(module: Module) -> dict[str, tuple[int, int]]:
    """Bits and group size of every quantized linear, by its layer."""
    nodes = [n for n in module.functions["step"].graph.nodes if "linear_q" in str(n.target)]
    return {str(n.args[1].target).removesuffix(".weight.codes"): (n.args[-3], n.args[-1]) for n in nodes}


@pytest.mark.parametrize("quantizer", ["quantize_weights", "gptq"])
def test_layers_that_match_have_their_own_format(quantizer: str, tmp_path: Path) -> None:
    module = mlp()
    calibrated(module, tmp_path, DOWN, (quantizer, G32))
    assert formats(module) == {
        f"layers.{i}.{n}_proj": (8, 64) if n == "down" else (4, 32) for i in range(2) for n in ("gate", "up", "down")
    }


def test_the_later_of_two_patterns_counts() -> None:
    found = []
    for passes in ((DOWN, FIRST), (FIRST, DOWN)):
        module = mlp()
        assert [record.rewrites for record in run(module, *passes)] == [2 if p is DOWN else 3 for p in passes]
        run(module, ("quantize_weights", G32))
        found.append(formats(module))
    assert found[0]["layers.0.down_proj"] == (3, 32)
    assert found[1]["layers.0.down_proj"] == (8, 64)
    assert {k: v for k, v in found[0].items() if k != "layers.0.down_proj"} == {
        k: v for k, v in found[1].items() if k != "layers.0.down_proj"
    }


def test_awq_scales_for_the_format_that_is_set(tmp_path: Path) -> None:
    module, plain = mlp(), mlp()
    calibrated(module, tmp_path / "a", DOWN, ("awq", G32))
    calibrated(plain, tmp_path / "b", ("awq", G32))
    shapes = [m.weights["layers.0.down_proj.weight"].limits.shape for m in (module, plain)]  # type: ignore[attr-defined]
    assert shapes == [(64, 2), (64, 4)]


def test_it_comes_before_what_was_chosen(tmp_path: Path) -> None:
    module = mlp()
    chosen: tuple[str, Options] = ("choose_precision", {"bits": [4, 8], "group_sizes": [32], "size": "60kB"})
    calibrated(module, tmp_path, chosen, FIRST, ("quantize_weights", {"bits": 8, "group_size": 32}))
    assert formats(module)["layers.0.up_proj"] == (3, 32)
    with pytest.raises(PassError, match="choose_precision must come before set_precision"):
        calibrated(mlp(), tmp_path, FIRST, chosen)


def test_a_layer_that_no_quantizer_takes_stays() -> None:
    module = mlp()
    exact = logits(module)
    assert run(module, DOWN)[-1].rewrites == 2
    assert float((logits(module) - exact).abs().max()) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "include": ["*.donw_proj"]}, r"pattern '\*\.donw_proj' matches no layer"),
        ({"bits": 8, "group_size": 128, "include": ["*.up_proj"]}, "group_size 128 does not divide its 64 input"),
        ({"bits": 9}, "target reference has no 9-bit weights"),
    ],
)
def test_bad_options_are_named(options: Options, message: str) -> None:
    with pytest.raises(PassError, match=message):
        run(mlp(), ("set_precision", options))


def test_bits_are_required_and_halves_of_experts_refused() -> None:
    with pytest.raises(ConfigError, match="option 'bits' is missing"):
        build_pass("set_precision", {})
    with pytest.raises(PassError, match="one call reads both"):
        run(mixture(), ("set_precision", {"bits": 8, "experts": True, "include": ["experts.down"]}))


def test_fp8_has_no_bits_to_set() -> None:
    with pytest.raises(PassError, match="fp8_e4m3 has no bits and group size to choose"):
        run(mlp(), DOWN, ("quantize_weights", {"format": "fp8_e4m3"}))


def test_the_order_survives_in_the_artifacts_recipe() -> None:
    text = "target: reference\npasses:\n" + "".join(f"  - {n}: {o}\n" for n, o in (FIRST, DOWN))
    recipe = parse_recipe(text.replace("'", '"'))
    assert [p.bits for p in parse_recipe(recipe.text).passes] == [3, 8]  # type: ignore[attr-defined]
