"""The library: built once, the same bytes everywhere, typed errors; the executor's choice between the two forms."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt.artifact import Artifact
from llmopt.cli.main import run
from llmopt.errors import TargetError
from llmopt.runtime.executors import onnxruntime as runtime
from llmopt.target import LoadOptions
from targets.onnxruntime import native


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_builds_are_the_same_bytes_and_hold_no_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    made = native.build()
    assert made == native.library()
    assert str(native.SOURCES).encode() not in made
    assert str(tmp_path).encode() not in made


def test_the_cache_is_used_and_damage_noticed(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(native, "build", lambda: counts.append(1) or b"code")
    assert native.library() == native.library() == b"code"
    assert len(counts) == 1
    (entry,) = (empty_cache / "native").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    assert native.library() == b"code"
    assert len(counts) == 2


def test_a_cache_that_cannot_be_written_is_no_error(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_cache.write_text("a file, not a folder")
    monkeypatch.setattr(native, "build", lambda: b"code")
    assert native.library() == b"code"


def test_what_the_compiler_says_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.c").write_text("int f(void) { return missing; }\n")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    with pytest.raises(TargetError, match=r"broken\.c:1.*missing"):
        native.build()


def test_a_missing_compiler_is_a_typed_error(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise native.PackageNotFoundError(name)

    monkeypatch.setattr(native, "version", missing)
    with pytest.raises(TargetError, match=r"not installed.*native_kernels: false"):
        native.library()


def test_the_executor_chooses_by_processor(
    embedded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both forms pass the artifact's golden tokens; without AVX2 the plain one runs, and says so."""
    path = tmp_path / "artifact"
    assert (
        run(["compile", str(embedded_model), "-r", "int4-cpu", "-o", str(path), "--max-context", "64", "--json"]) == 0
    )
    artifact, options = Artifact.open(path), LoadOptions(threads=1, max_sequences=2)
    assert runtime.native_library(artifact, options) == path / runtime.NATIVE_LIBRARY_FILE
    assert runtime.native_library(artifact, replace(options, device="cuda")) is None
    runtime.load(artifact, options).close()
    monkeypatch.setattr(runtime, "runs_here", lambda library: False)
    with caplog.at_level(logging.WARNING):
        runtime.load(artifact, options).close()
    assert "AVX2" in caplog.text
