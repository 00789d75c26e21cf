"""Digests of the weights: at opening, or left to whoever loads them; never lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifact import Artifact
from llmopt.artifact.chunks import Chunks
from llmopt.errors import ArtifactError
from llmopt.runtime import executors
from llmopt.target import LoadOptions


@pytest.fixture
def written(tmp_path: Path, write: Callable[..., Any]) -> Path:
    """A small artifact."""
    write(tmp_path / "a")
    return tmp_path / "a"


def damage(path: Path) -> None:
    """Flip a bit of the weights' last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_deferred_digests_are_checked_before_an_executor_loads(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(written / "weights.safetensors")
    with pytest.raises(ArtifactError, match="is not what the manifest names"):
        Artifact.open(written)
    opened = Artifact.open(written, defer=True)
    assert isinstance(opened.unchecked, Chunks)
    loaded: list[Any] = []

    class Plain:
        load = staticmethod(lambda artifact, options: loaded.append(artifact.unchecked))

    class Reader(Plain):
        CHECKS_WEIGHTS = True

    monkeypatch.setattr(executors, "find_spec", lambda name: object())
    monkeypatch.setattr(executors, "import_module", lambda name: Plain)
    with pytest.raises(ArtifactError, match="is not what the manifest names"):
        executors.load_executor(opened, LoadOptions())
    assert loaded == []
    monkeypatch.setattr(executors, "import_module", lambda name: Reader)
    executors.load_executor(opened, LoadOptions())
    assert loaded == [opened.unchecked], "the executor checks them itself"


def test_without_verification_nothing_is_left_to_check(written: Path) -> None:
    damage(written / "weights.safetensors")
    assert Artifact.open(written, verify=False, defer=True).unchecked is None
