"""Recipes and the registry: strict, with the nearest name in every error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmopt.errors import ConfigError, TargetError
from llmopt.ir.pass_manager import check_order
from llmopt.recipe import build_pass, load_recipe, parse_recipe
from llmopt.registry import load_executor_module, load_pass, load_target, names, recipe_path

GOOD = """
target: reference
dtype: bfloat16
max_context: 2048
passes:
  - fuse_qkv: {expect: 4}
  - rewrite_kv_cache: {layout: ring, sinks: 4, full_layout: slots}
  - prune_logits
target_options: {b: 1, a: [2]}
"""


def test_parses() -> None:
    recipe = parse_recipe(GOOD)
    assert (recipe.target, recipe.torch_dtype, recipe.max_context) == ("reference", torch.bfloat16, 2048)
    assert [p.name for p in recipe.passes] == ["fuse_qkv", "rewrite_kv_cache", "prune_logits"]
    assert recipe.passes[0].expect == 4
    assert recipe.target_options == {"a": [2], "b": 1}


def test_text_is_canonical() -> None:
    spaced = GOOD.replace("{b: 1, a: [2]}", "\n  a: [2]\n  b: 1").replace("sinks: 4, full_layout: slots", "full_layout: slots, sinks: 4")  # fmt: skip  # noqa: E501
    assert parse_recipe(spaced).text == parse_recipe(GOOD).text
    assert parse_recipe(parse_recipe(GOOD).text).text == parse_recipe(GOOD).text


@pytest.mark.parametrize("name", names("recipes"))
def test_built_in_recipes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    check_order(recipe.passes)
    assert parse_recipe(recipe.text, name).passes == recipe.passes


def test_the_issue_s_recipes_exist() -> None:
    assert {"fp32-cpu", "int8-cpu", "int4-cpu", "bf16-cuda"} <= set(names("recipes"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("targt: reference", "unknown key 'targt' .did you mean 'target'"),
        ("dtype: float32", "target: Field required"),
        ("target: reference\ndtype: fp32", "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        ("target: reference\nmax_context: '8'", "max_context: Input should be a valid integer"),
        ("target: reference\nmax_context: 0", "max_context must be at least 1"),
        ("target: reference\npasses: [fuse_qv]", "pass 1: unknown pass 'fuse_qv' .did you mean 'fuse_qkv'"),
        (
            "target: reference\npasses: [{fuse_qkv: {expct: 1}}]",
            "fuse_qkv.: unknown key 'expct' .did you mean 'expect'",
        ),
        ("target: reference\npasses: [{fuse_qkv: {expect: one}}]", "option 'expect': Input should be a valid integer"),
        ("target: reference\npasses: [{fuse_qkv: {}, prune_logits: {}}]", "one name, or one name with its options"),
        ("target: reference\npasses: fuse_qkv", "passes: Input should be a valid list"),
        ("target: reference\ntarget: reference", "key 'target' is given twice"),
        ("target: [", "not valid YAML"),
        ("- target", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("target: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_recipes(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_recipe(text, "bad")
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'int4-cp' \(did you mean 'int4-cpu'"):
        load_recipe("int4-cp")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"target: \xe9")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "good.yaml").write_text(GOOD)
    assert load_recipe(tmp_path / "good.yaml").name == "good"


def test_registry() -> None:
    assert {"fuse_qkv", "quantize_weights"} <= set(names("passes"))
    assert {"reference", "onnxruntime"} <= set(names("targets"))
    assert all(load_pass(name).name == name for name in names("passes"))
    assert load_target("reference").name == "reference"
    assert load_executor_module("reference").ReferenceExecutor
    assert recipe_path("fp32-cpu").is_file()
    with pytest.raises(TargetError, match=r"unknown target 'referenc' \(did you mean 'reference'"):
        load_target("referenc")
    with pytest.raises(ConfigError, match=r"unknown pass '\.\./passes/fuse_qkv'"):
        load_pass("../passes/fuse_qkv")


def test_options_are_fields() -> None:
    assert build_pass("rewrite_kv_cache", {"layout": "slots"}) == load_pass("rewrite_kv_cache")(layout="slots")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="option 'functions'"):
        build_pass("fuse_qkv", {"functions": "decode"})
