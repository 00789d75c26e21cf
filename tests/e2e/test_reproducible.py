"""Equal inputs give byte-identical artifacts: another directory, another hash seed, another process."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def build(checkpoint: Path, folder: Path, seed: str, recipe: str, cache: Path | None = None) -> dict[str, str]:
    """sha256 of every file of an artifact compiled by a fresh process inside ``folder``, with an empty cache or one."""
    folder.mkdir()
    shutil.copytree(checkpoint, folder / "model")
    environment = {**os.environ, "PYTHONHASHSEED": seed, "LLMOPT_CACHE": str(cache or folder / "cache")}
    command = [sys.executable, "-m", "llmopt.cli.main", "compile", "model", "-r", recipe, "-o", "artifact"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    files = sorted(p for p in (folder / "artifact").rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.slow
def test_artifacts_are_byte_identical(embedded_model: Path, tmp_path: Path) -> None:
    first = build(embedded_model, tmp_path / "here", "1", "int4-cpu")
    second = build(embedded_model, tmp_path / "elsewhere", "2", "int4-cpu")
    assert first == second
    assert build(embedded_model, tmp_path / "other", "1", "int8-cpu", tmp_path / "here" / "cache") != first
