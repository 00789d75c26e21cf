"""``llmopt tune``: a bundle built from a config, timed by a fake GPU into a table that a build then takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmopt.cli.main import run
from llmopt.errors import TargetError
from llmopt.registry import load_tuner
from targets.cuda.tuning import timing
from targets.cuda.tuning.bundle import open_bundle
from targets.cuda.tuning.table import load_table
from tests.targets.cuda.tuning.cases import COMPILER, FakeTimer, bundle, entry

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 256, "head_dim": 16,
    "max_position_embeddings": 128, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
}  # fmt: skip


class Countdown(FakeTimer):
    """Later configurations are faster."""

    left = 1000.0

    def time(self, entry: Any, best: float) -> timing.Timed:
        self.left -= 1
        return super().time(replace(entry, config={"time": self.left}), best)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "GpuTimer", lambda made, device: Countdown())


def call(*arguments: object) -> int:
    return run([str(a) for a in ("tune", *arguments)])


@pytest.mark.slow
@pytest.mark.usefixtures("fake_gpu")
def test_what_is_built_is_timed_and_then_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, made, table = tmp_path / "config.json", tmp_path / "bundle", tmp_path / "sm_90.json"
    config.write_text(json.dumps(CONFIG))
    only = "gemv bfloat16 1x64x64$"
    assert call(config, "-r", "bf16-cuda", "--build-only", made, "--only", only, "--json") == 0
    built = json.loads(capsys.readouterr().out)
    assert built["shapes"] == 1
    assert built["candidates"] == len(open_bundle(made).entries) >= 2
    assert call("--time", made, "-o", table, "--rows", tmp_path / "rows.jsonl", "--json") == 0
    timed = json.loads(capsys.readouterr().out)
    last = open_bundle(made).entries[-1].config
    assert timed["best"]["gemv"]["bfloat16 1x64x64"] == {**last, "us": 1000.0 - built["candidates"]}
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == built["candidates"]
    assert load_table(90, built["compiler"], table).table["gemv"]["bfloat16 1x64x64"]["rows"] == last["rows"]


@pytest.mark.usefixtures("fake_gpu")
def test_results_for_people_name_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle(tmp_path / "b", entry("bfloat16 1x8x8", {"time": 2}))
    assert call("--time", tmp_path / "b", "-o", tmp_path / "t.json") == 0
    out = capsys.readouterr().out
    assert "bfloat16 1x8x8" in out
    assert "entries of this compiler" in out
    assert COMPILER in out


def test_a_damaged_bundle_ends_with_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--time", tmp_path, "-o", tmp_path / "t.json") == 9
    assert "not a bundle of candidates" in capsys.readouterr().err


def test_no_gpu_ends_with_its_code_and_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bundle(tmp_path / "b", entry("bfloat16 1x8x8", {"rows": 1}))
    assert call("--time", tmp_path / "b", "-o", tmp_path / "t.json") == 10
    assert not (tmp_path / "t.json").exists()


@pytest.mark.usefixtures("fake_gpu")
def test_a_table_of_another_architecture_is_known_before_timing(tmp_path: Path) -> None:
    bundle(tmp_path / "b", entry("bfloat16 1x8x8", {"fail": "executor: nothing should be timed; dead"}))
    (tmp_path / "t.json").write_text('{"arch": 80, "compilers": {}}')
    assert call("--time", tmp_path / "b", "-o", tmp_path / "t.json") == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a checkpoint"), (("config.json",), "give a checkpoint"),
        (("config.json", "-r", "bf16-cuda", "--time", "b"), "takes a bundle that exists"),
        (("--time", "b", "--only", "("), "not a regular expression"),
    ],
)  # fmt: skip
def test_contradictions_are_named(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 3
    assert words in capsys.readouterr().err


def test_nothing_to_time_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, made = tmp_path / "config.json", tmp_path / "bundle"
    config.write_text(json.dumps(CONFIG))
    assert call(config, "-r", "bf16-cuda", "--build-only", made, "--only", "gemv float64") == 3
    assert "'gemv float64' matches no configuration of these shapes" in capsys.readouterr().err
    assert not made.exists()


def test_a_bundle_does_not_go_where_something_is(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    assert call("config.json", "-r", "bf16-cuda", "--build-only", tmp_path) == 3
    assert (tmp_path / "kept").exists()


@pytest.mark.parametrize("error", [TargetError("no"), KeyError("a bug"), KeyboardInterrupt()], ids=repr)
def test_a_bundle_half_made_is_removed(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Any, options: Any, folder: Path, *others: object) -> None:
        folder.mkdir()
        (folder / "some.cubin").write_bytes(b"half")
        raise error

    config, made = tmp_path / "config.json", tmp_path / "bundle"
    config.write_text(json.dumps(CONFIG))
    monkeypatch.setattr(load_tuner("cuda"), "build_candidates", fail)
    assert call(config, "-r", "bf16-cuda", "--build-only", made) != 0
    assert not made.exists()


def test_a_target_without_configurations_says_so() -> None:
    with pytest.raises(TargetError, match="reference has nothing to tune"):
        load_tuner("reference")
