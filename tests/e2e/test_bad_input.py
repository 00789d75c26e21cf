"""Bad input to ``llmopt compile``: one line, the documented exit code, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmopt.cli.main import run

RECIPE = "target: onnxruntime\npasses:\n  - rewrite_kv_cache: {layout: slots}\n"
SHARD = "model.safetensors"


@pytest.fixture
def checkpoint(embedded_model: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(embedded_model, tmp_path / "model"))


def fails(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """The command exits with ``code`` and one line of error that holds every word."""
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert [w for w in words if w not in captured.err] == []


def edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensor(checkpoint: Path, name: str, change: Callable[[Any], Any]) -> None:
    import ml_dtypes  # noqa: F401  (numpy's bfloat16)

    tensors = load_file(checkpoint / SHARD)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, checkpoint / SHARD)


def with_nan(tensor: Any) -> Any:
    tensor = tensor.copy()
    tensor[0, 0] = float("nan")
    return tensor


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], int, tuple[str, ...]]] = {
    "missing shard": (lambda c: (c / SHARD).unlink(), 4, (SHARD,)),
    "truncated shard": (lambda c: (c / SHARD).write_bytes((c / SHARD).read_bytes()[:-100]), 4, (SHARD, "truncated")),
    "garbage shard": (lambda c: (c / SHARD).write_bytes(b"\xff" * 64), 4, (SHARD,)),
    "NaN": (lambda c: edit_tensor(c, Q, with_nan), 4, (Q, "NaN")),
    "shape": (lambda c: edit_tensor(c, Q, lambda t: t[:-1]), 4, (Q, "shape")),
    "architecture": (lambda c: edit_config(c, model_type="telepathy"), 5, ("telepathy",)),
    "auto_map": (lambda c: edit_config(c, auto_map={"AutoModel": "evil.Model"}), 4, ("auto_map",)),
    "not JSON": (lambda c: (c / "config.json").write_text("{"), 4, ("config.json",)),
    "chat template": (
        lambda c: (c / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        4,
        ("chat template", "sandbox"),
    ),
    "pickle": (lambda c: (c / SHARD).rename(c / "pytorch_model.bin"), 4, ("pickle", "safetensors")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_checkpoint(what: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, code, words = DAMAGE[what]
    damage(checkpoint)
    before = set(tmp_path.iterdir())
    fails(["compile", str(checkpoint), "-r", "int8-cpu", "-o", str(tmp_path / "out")], code, capsys, *words)
    assert set(tmp_path.iterdir()) == before


RECIPES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "unknown key": (RECIPE + "dtpye: float32\n", 3, ("dtpye", "did you mean", "dtype")),
    "unknown pass": (RECIPE + "  - fuse_qvk\n", 3, ("fuse_qvk", "fuse_qkv")),
    "unknown option": (RECIPE + "  - prune_logits: {depth: 2}\n", 3, ("depth",)),
    "unknown target": (RECIPE.replace("onnxruntime", "onnxruntimes"), 8, ("onnxruntimes", "onnxruntime")),
    "unknown target option": (RECIPE + "target_options: {accuracy: 4}\n", 3, ("accuracy_level",)),
    "order": (RECIPE.replace("passes:\n", "passes:\n  - fuse_rope_kv_write\n"), 6, ("rewrite_kv_cache", "before")),
    "no cache": (RECIPE.replace("rewrite_kv_cache: {layout: slots}", "eliminate_noops"), 8, ("rewrite_kv_cache",)),
    "group size": (
        RECIPE + "  - quantize_weights: {bits: 4, group_size: 128}\n",
        6,
        ("group_size", "layer model.layers.0"),
    ),
    "expect": (RECIPE + "  - prune_logits: {expect: 2}\n", 6, ("prune_logits", "expects 2")),
    "dtype": (RECIPE + "dtype: float64\n", 3, ("dtype",)),
    "YAML": ("target: [", 3, ("YAML",)),
}


@pytest.mark.parametrize("what", RECIPES)
def test_bad_recipe(what: str, embedded_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, code, words = RECIPES[what]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    fails(["compile", str(embedded_model), "-r", str(recipe), "-o", str(tmp_path / "out")], code, capsys, *words)
    assert list(tmp_path.iterdir()) == [recipe]


def test_an_unknown_recipe_is_named(embedded_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(["compile", str(embedded_model), "-r", "int4-gpu", "-o", str(tmp_path / "o")], 3, capsys, "int4-cpu")


def test_a_directory_that_is_no_artifact_stays(
    embedded_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("data")
    fails(["compile", str(embedded_model), "-r", "fp32-cpu", "-o", str(tmp_path)], 9, capsys, str(tmp_path))
    assert (tmp_path / "precious").read_text() == "data"


def test_a_full_disk_leaves_nothing(
    embedded_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmopt.artifact.writer as writer

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_tensors", full)
    fails(["compile", str(embedded_model), "-r", "fp32-cpu", "-o", str(tmp_path / "out")], 10, capsys, "disk is full")
    assert list(tmp_path.iterdir()) == []
