"""Equal inputs give byte-identical cuda artifacts: other directories, sources elsewhere, no cache, other hash seeds."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
target: cuda
dtype: bfloat16
max_context: 64
passes:
  - eliminate_noops
  - fuse_qkv
  - fuse_gate_up
  - fuse_gated_activation
  - fuse_add_norm
  - rewrite_kv_cache: {layout: paged, block_size: 16}
  - fuse_rope_kv_write
  - prune_logits
target_options: {decode_buckets: [1], extend_buckets: [16], extend_sequences: [1]}
"""
SOURCES = ("llmopt", "passes", "targets", "recipes")


def build(sources: Path, checkpoint: Path, folder: Path, seed: str) -> dict[str, str]:
    """sha256 of every file of an artifact, compiled by a copy of the sources inside ``folder`` with an empty cache."""
    folder.mkdir(parents=True)
    for name in SOURCES:
        shutil.copytree(sources / name, folder / name)
    shutil.copytree(checkpoint, folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("TRITON_")},
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": str(folder),
        "LLMOPT_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "llmopt.cli.main", "compile", "model", "-r", "recipe.yaml", "-o", "artifact"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((folder / "cache" / "cubins").glob("*.cubin")), "every kernel was compiled here"
    files = sorted(p for p in (folder / "artifact").rglob("*") if p.is_file())
    for file in files:
        assert str(folder).encode() not in file.read_bytes(), f"{file.name} holds the build's path"
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.slow
def test_two_builds_are_byte_identical(root: Path, embedded_model: Path, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    for name in SOURCES:
        shutil.copytree(root / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    places = (("here", "1"), ("another/place/of/other/length", "2"))
    first, second = (build(sources, embedded_model, tmp_path / place, seed) for place, seed in places)
    assert sum(name.endswith(".cubin") for name in first) > 10
    assert second == first
