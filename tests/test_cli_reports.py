"""inspect, bench and eval on the embedded model compiled for the reference target."""

from __future__ import annotations

import json
import shutil

import pytest

from llmopt.cli.main import run

pytestmark = pytest.mark.xdist_group("reports")  # the artifact is compiled once


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, embedded_model):
    from llmopt.compiler import compile_checkpoint
    from llmopt.recipe import load_recipe

    path = tmp_path_factory.mktemp("reports") / "artifact"
    compile_checkpoint(embedded_model, load_recipe("fp32-reference"), path)
    return path


@pytest.fixture
def json_of(capsys):
    """Runs a command line that must succeed and parses what it printed."""

    def call(*arguments: object) -> object:
        assert run([str(a) for a in (*arguments, "--json")]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_inspect_shows_the_record_and_the_ledger(artifact, capsys):
    assert run(["inspect", str(artifact)]) == 0
    lines = capsys.readouterr().out.splitlines()
    fused = next(line.split() for line in lines if line.startswith("fuse_qkv"))
    assert fused[1] == "3"
    assert float(fused[-1]) > 0
    assert any(line.startswith("FLOPs") and "%" in line for line in lines)
    assert any(line.startswith("weights, embedded") for line in lines)


def test_inspect_json_agrees_with_the_files(artifact, json_of):
    shown = json_of("inspect", artifact)
    assert shown["report"] == json.loads((artifact / "report.json").read_text())
    assert shown["manifest"]["target"] == "reference"
    assert [p["name"] for p in shown["build_log"]["passes"]] == [p["name"] for p in shown["report"]["passes"]]


def test_inspect_without_the_build_log_has_no_times(artifact, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    assert run(["inspect", str(copy)]) == 0
    fused = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fuse_qkv"))
    assert fused.split()[-1] == "-"


def test_inspect_refuses_a_flipped_byte(artifact, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    data = bytearray((copy / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(data)
    assert run(["inspect", str(copy)]) == 9
    assert capsys.readouterr().err.startswith("error: weights.safetensors: ")
    assert run(["inspect", str(copy), "--no-verify"]) == 0


def test_bench_measures_each_batch_and_appends_rows(artifact, tmp_path, json_of):
    store = tmp_path / "rows.jsonl"
    options = ("--prompt-len", 16, "--gen-len", 6, "--batch", "1,3", "--repeat", 1, "--append", store)
    rows = json_of("bench", artifact, *options)
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["tok_s"] == pytest.approx(row["batch"] * 1e3 / row["ms"], rel=1e-2)
        assert row["floor_percent"] == pytest.approx(100 * row["floor_ms"] / row["ms"], rel=0.05, abs=0.1)
        assert row["model"] == "classics-2m"
    assert [json.loads(line) for line in store.read_text().splitlines()] == rows


@pytest.mark.parametrize("options", [["--prompt-len", "4000"], ["--gen-len", "2040", "--prompt-len", "9"]])
def test_bench_longer_than_the_context_is_a_config_error(artifact, capsys, options):
    assert run(["bench", str(artifact), *options]) == 3
    assert "the context is 2048" in capsys.readouterr().err


def test_eval_equals_transformers_and_its_baseline(artifact, embedded_model, tmp_path, json_of):
    """Perplexity through the artifact against HF eager on the same windows."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    text = tmp_path / "text.txt"
    text.write_text("The captain walked along the shore and spoke of the long voyage home. " * 12, encoding="utf-8")
    options = ("--text", text, "--window", 48, "--tokens", 144, "--baseline", embedded_model)
    result = json_of("eval", artifact, *options)
    ids = Tokenizer.from_file(str(embedded_model / "tokenizer.json")).encode(text.read_text()).ids
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor(ids[:144]).view(3, 48)).logits.double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(ids[1:145])).exp().item()
    assert result["windows"] == 3
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert result["baseline"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert abs(result["baseline"]["change"]["value"]) < 1e-5
    assert result["baseline"]["kl_mean"] < 1e-8
    assert result["baseline"]["top1_agreement"] > 0.99


@pytest.mark.parametrize(
    ("content", "options", "code"),
    [(b"\xff\xfe bad", [], 11), (b"short", [], 11), (b"short", ["--window", "4096"], 3), (None, [], 11)],
)
def test_eval_refuses_bad_input(artifact, tmp_path, capsys, content, options, code):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert run(["eval", str(artifact), "--text", str(text), *options]) == code
    assert capsys.readouterr().err.count("\n") == 1
