"""Builds with calibration: figures in the manifest, resumption, reproducibility, the model's own text, bad text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llmopt.compiler as compiler
from llmopt.artifact import Artifact
from llmopt.cli.main import run
from llmopt.compiler import CompileOptions, compile_checkpoint
from llmopt.recipe import parse_recipe

RECIPE = """
target: onnxruntime
calibration: {tokens: 256, window: 64}
passes:
  - fuse_qkv
  - awq: {bits: 4, group_size: 32, clip: false}
  - gptq: {bits: 4, group_size: 32}
  - rewrite_kv_cache: {layout: slots}
  - prune_logits
"""
TEXT = " ".join(f"On the {i}th day the captain wrote of wind, water and the price of salt." for i in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def build(model: Path, output: Path, text: Path | None, ran: list[str] | None = None, **options: Any) -> Artifact:
    recipe = parse_recipe(RECIPE)
    samples = recipe.calibration.model_copy(update={"text": text and str(text)})
    progress = (lambda what, done, total: ran.append(what)) if ran is not None else (lambda *_: None)
    compile_checkpoint(model, recipe, output, CompileOptions(calibration=samples, progress=progress, **options))
    return Artifact.open(output)


@pytest.mark.slow
def test_a_build_says_what_it_lost(embedded_model: Path, tmp_path: Path, text: Path) -> None:
    artifact = build(embedded_model, tmp_path / "a", text, sensitivity=True)
    found = artifact.manifest.accuracy
    assert found["windows"] == 4
    assert found["window"] == 64
    base = found["baseline"]
    assert 0 < base["kl_mean"] < 0.5
    assert base["intervals"]["kl_mean"][0] <= base["kl_mean"] <= base["intervals"]["kl_mean"][1]
    report = json.loads(artifact.file("report.json").read_text())["accuracy"]
    assert len(report["layers"]) == 15
    assert all(0 < layer["output_error"] < 0.1 and layer["kl"] > 0 for layer in report["layers"])
    assert artifact.file("accuracy.html").read_text().count("<svg") == 4
    assert not (tmp_path / "a.calibration").exists()
    again = build(embedded_model, tmp_path / "b", text, sensitivity=True)
    assert again.manifest.accuracy == found
    assert again.manifest.weights.digest == artifact.manifest.weights.digest


@pytest.mark.slow
def test_an_interrupted_build_does_nothing_twice(
    embedded_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*arguments: Any) -> Any:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "record_golden", stop)
        with pytest.raises(Stop):
            build(embedded_model, tmp_path / "a", text)
    assert (tmp_path / "a.calibration").is_dir()
    ran: list[str] = []
    resumed = build(embedded_model, tmp_path / "a", text, ran)
    assert not [what for what in ran if what.startswith(("awq", "gptq"))]
    whole = build(embedded_model, tmp_path / "b", text, ran)
    assert [what for what in ran if what.startswith("gptq")]
    assert resumed.manifest.weights.digest == whole.manifest.weights.digest


@pytest.mark.slow
def test_without_a_text_the_model_writes_one(embedded_model: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    assert build(embedded_model, tmp_path / "a", None, ran).manifest.accuracy["windows"] == 4
    assert "calibration text" in ran


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"too short", 11, "calibration and its held-out part need"),
        (b"\xff", 11, "not UTF-8"),
        (None, 11, "No such file"),
    ],
)
def test_bad_text_is_one_line(
    embedded_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    code: int,
    words: str,
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    arguments = ["compile", embedded_model, "-r", tmp_path / "r.yaml", "-o", tmp_path / "a"]
    assert run([*map(str, arguments), "--calibration", str(tmp_path / "t.txt")]) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("a*"))


@pytest.mark.slow
def test_eval_writes_its_report(embedded_model: Path, tmp_path: Path, text: Path) -> None:
    build(embedded_model, tmp_path / "a", text)
    options = [
        "--text",
        text,
        "--window",
        64,
        "--tokens",
        256,
        "--baseline",
        embedded_model,
        "--report",
        tmp_path / "r",
    ]
    assert run(["eval", str(tmp_path / "a"), *map(str, options)]) == 0
    result = json.loads((tmp_path / "r" / "report.json").read_text())
    assert result["baseline"]["kl_mean"] > 0
    assert "captain" in (tmp_path / "r" / "index.html").read_text()
    assert run(["eval", str(tmp_path / "a"), "--text", str(text), "--report", str(tmp_path / "x")]) == 3
