"""plan's numbers against a build of the same model, and make-checkpoint's output against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmopt.artifact import Artifact
from llmopt.cli.main import run as run_cli
from llmopt.cli.plan import Size, plan
from llmopt.compiler import compile_checkpoint
from llmopt.errors import CheckpointError, ConfigError
from llmopt.plan import contexts, plan_build
from llmopt.recipe import load_recipe, parse_recipe

HEADS, HEAD_DIM, LAYERS = 1, 64, 3  # the embedded model
PER_TOKEN = 2 * HEADS * HEAD_DIM * LAYERS * 4

RING = """
target: reference
passes:
  - rewrite_kv_cache: {layout: ring}
  - prune_logits
"""


def test_the_plan_is_what_the_build_weighs(embedded_model: Path, tmp_path: Path) -> None:
    recipe = load_recipe("int4-cpu")
    found = plan_build(embedded_model, recipe, 1e9, 1e10, 512)
    compiled = compile_checkpoint(embedded_model, recipe, tmp_path / "out", max_context(512))
    artifact = Artifact.open(tmp_path / "out")
    assert found.checkpoint_bytes == compiled.report["bytes"]["checkpoint"]
    assert found.weight_bytes == pytest.approx(artifact.manifest.weights.bytes, rel=0.03)
    assert found.kv_per_token == compiled.report["bytes"]["kv_per_token"] == PER_TOKEN
    assert found.kv_fixed == 0
    assert found.max_context == 512


def max_context(length: int) -> Any:
    from llmopt.compiler import CompileOptions

    return CompileOptions(max_context=length)


def test_a_config_is_enough(embedded_model: Path, tmp_path: Path) -> None:
    recipe = load_recipe("int4-cpu")
    whole = plan_build(embedded_model, recipe, 1e9, 1e10).to_json()
    config = tmp_path / "some.json"
    config.write_text((embedded_model / "config.json").read_text())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(config.read_text())
    assert plan_build(config, recipe, 1e9, 1e10).to_json() == whole
    assert plan_build(tmp_path / "folder", recipe, 1e9, 1e10).to_json() == whole


def test_what_fits_is_the_most_that_fits(embedded_model: Path) -> None:
    found = plan_build(embedded_model, load_recipe("fp32-reference"), 40e6, 1e10)
    room = found.memory - found.weight_bytes - found.activation_bytes
    assert found.largest_context == 2048
    for fit in found.fits:
        assert fit.sequence_bytes == fit.context * PER_TOKEN
        assert fit.batch * fit.sequence_bytes <= room < (fit.batch + 1) * fit.sequence_bytes
    floors = list(found.floor_ms.values())
    assert floors == sorted(floors)
    read = found.floor_ms[2048] * 1e-3 * 1e10
    assert read == pytest.approx(found.weight_bytes + 2048 * PER_TOKEN, rel=0.01)


def test_too_little_memory(embedded_model: Path) -> None:
    recipe = load_recipe("fp32-reference")
    nothing = plan_build(embedded_model, recipe, 1e6, 1e10)
    assert nothing.largest_context is None
    assert all(fit.batch == 0 and fit.floor_ms is None for fit in nothing.fits)
    base = nothing.weight_bytes + nothing.activation_bytes
    tight = plan_build(embedded_model, recipe, base + 100 * PER_TOKEN, 1e10)
    assert tight.largest_context == 96  # whole blocks of 16
    assert plan_build(embedded_model, recipe, base - 1, 1e10).largest_context is None


def test_a_ring_costs_a_sequence_not_its_tokens(tmp_path: Path) -> None:
    from tests.architectures import ARCHITECTURES

    config = tmp_path / "config.json"
    ARCHITECTURES["mistral"]().save_pretrained(tmp_path)
    found = plan_build(config, parse_recipe(RING), 1e9, 1e10)
    assert found.kv_per_token == 0
    assert found.kv_fixed > 0
    assert {fit.sequence_bytes for fit in found.fits} == {found.kv_fixed}


def test_recipes_without_a_cache_are_refused(embedded_model: Path) -> None:
    with pytest.raises(ConfigError, match="no KV cache to plan"):
        plan_build(embedded_model, parse_recipe("target: reference\npasses: []\n"), 1e9, 1e10)


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        plan_build(tmp_path / "nothing", load_recipe("fp32-reference"), 1e9, 1e10)


def test_contexts_end_at_the_longest() -> None:
    assert contexts(100) == [100]
    assert contexts(4096) == [512, 2048, 4096]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("1.5tb", 1.5e12), ("1000", 1000.0), ("8g", 8e9), ("12Mi", 12 * 2**20)],
)
def test_sizes(text: str, expected: float) -> None:
    assert Size("size").convert(text, None, None) == expected
    assert Size("rate", True).convert(text + "/s", None, None) == expected


@pytest.mark.parametrize("text", ["lots", "-3GB", "0", "24GB/s", "3 XB", "iB"])
def test_what_is_no_size(text: str) -> None:
    result = CliRunner().invoke(plan, ["x", "-r", "int4-cpu", "--memory", text])
    assert result.exit_code == 2
    assert "is no size" in result.output


def test_command(embedded_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(embedded_model), "-r", "int4-cpu", "--memory", "1GB", "--bandwidth", "10GB/s"]
    assert run_cli([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["memory"], found["bandwidth"], found["bandwidth_measured"]) == (1e9, 1e10, False)
    assert run_cli(arguments) == 0
    assert "tokens in one sequence" in capsys.readouterr().out
