"""Random checkpoints: what transformers and our own frontend read, the same bytes every time, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmopt.cli.main import run as run_cli
from llmopt.errors import ConfigError, ResourceError, UnsupportedModelError
from llmopt.frontend import capture, load_checkpoint, synthetic
from llmopt.frontend.blueprint import known_shapes, named_config, with_layers
from llmopt.frontend.synthetic import make_checkpoint
from tests.architectures import ARCHITECTURES


def tiny(name: str = "llama", **changes: Any) -> dict[str, Any]:
    return {**ARCHITECTURES[name]().to_dict(), **changes}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_transformers_and_our_frontend_find_every_tensor(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "out", tiny(name))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    logits = model(torch.arange(3, 12)[None]).logits.detach()
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0
    assert capture(load_checkpoint(tmp_path / "out")).module.weights


def test_norms_are_near_their_own_initialization_but_not_at_it(tmp_path: Path) -> None:
    for name, center in (("llama", 1.0), ("gemma2", 0.0)):
        make_checkpoint(tmp_path / name, tiny(name))
        weight = load_checkpoint(tmp_path / name).weights["model.norm.weight"].tensor().float()
        assert 0 < float((weight - center).abs().max()) < 0.1
    bias = load_checkpoint(tmp_path / "llama").weights["model.layers.0.self_attn.q_proj.bias"].tensor()
    assert float(bias.abs().max()) > 0


def test_a_function_of_config_seed_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "a", tiny(), seed=1)
    monkeypatch.setattr("llmopt.artifact.tensorfile.READ_BYTES", 100)
    make_checkpoint(tmp_path / "elsewhere" / "b", tiny(), seed=1)
    make_checkpoint(tmp_path / "c", tiny(), seed=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "elsewhere" / "b")
    assert contents(tmp_path / "a")["model.safetensors"] != contents(tmp_path / "c")["model.safetensors"]


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "one", tiny())
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 20_000)
    steps: list[tuple[int, int]] = []
    made = make_checkpoint(tmp_path / "many", tiny(), progress=lambda what, done, total: steps.append((done, total)))
    assert made.shards > 3
    assert steps[-1] == (made.bytes, made.bytes)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    one, many = (load_checkpoint(tmp_path / n).weights for n in ("one", "many"))
    assert {n: w.tensor().tolist() for n, w in one.items()} == {n: w.tensor().tolist() for n, w in many.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(tmp_path: Path, dtype: str) -> None:
    made = make_checkpoint(tmp_path / "out", tiny(), dtype=dtype)
    found = load_checkpoint(tmp_path / "out")
    assert {w.dtype for w in found.weights.values()} == {getattr(torch, dtype)}
    assert (
        made.bytes == sum(w.nbytes for w in found.weights.values()) == made.parameters * getattr(torch, dtype).itemsize
    )
    assert found.config["dtype"] == dtype


def test_large_matrices_have_the_spread_and_no_equal_rows(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "out", tiny(hidden_size=512, vocab_size=4096, initializer_range=0.05))
    weight = load_checkpoint(tmp_path / "out").weights["lm_head.weight"].tensor().float()
    assert float(weight.std()) == pytest.approx(0.05, rel=0.02)
    assert len(weight.unique(dim=0)) == len(weight)


def test_layers() -> None:
    config = with_layers(named_config("gpt-oss-tiny"), 3)
    assert config["num_hidden_layers"] == 3
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert len(with_layers(named_config("gpt-oss-tiny"), 9)["layer_types"]) == 9
    assert with_layers({"n_layer": 2}, 5) == {"n_layer": 5}
    with pytest.raises(ConfigError, match="cannot make it 2 layers"):
        with_layers({}, 2)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-8b", 8.03), ("llama-3.2-1b", 1.236), ("llama-125m", 0.1247), ("qwen3-0.6b", 0.596),
     ("qwen3-8b", 8.19), ("mistral-7b", 7.248), ("mixtral-8x7b", 46.7)],
)  # fmt: skip
def test_known_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    from math import prod

    from llmopt.frontend.blueprint import Blueprint

    blueprint = Blueprint.of(named_config(name))
    assert sum(prod(s) for s in blueprint.shapes.values()) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_known_tiny_shape_is_made(tmp_path: Path) -> None:
    for name in (n for n in known_shapes() if n.endswith("-tiny")):
        made = make_checkpoint(tmp_path / name, named_config(name))
        assert made.tokenizer
        capture(load_checkpoint(tmp_path / name))


def test_tokenizer_is_byte_level_and_covers_the_vocabulary(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "out", tiny(vocab_size=700, bos_token_id=3, eos_token_id=[5, 300]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 700
    text = "Grüße, 世界! \n\t🙂  "
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (3, 5)
    backend = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    every = [backend.decode([i], skip_special_tokens=False) for i in range(700)]
    assert all(every)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [5, 300]


def test_a_vocabulary_too_small_for_bytes_has_no_tokenizer(tmp_path: Path) -> None:
    assert not make_checkpoint(tmp_path / "out", tiny()).tokenizer
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown shape 'lama-125m' \(did you mean 'llama-125m'\?\)"):
        named_config("lama-125m")
    with pytest.raises(ConfigError, match=r"unknown dtype 'bfloat61' \(did you mean 'bfloat16'\?\)"):
        make_checkpoint(tmp_path / "out", tiny(), dtype="bfloat61")
    with pytest.raises(UnsupportedModelError, match="unknown architecture 'nothing'"):
        make_checkpoint(tmp_path / "out", tiny(model_type="nothing"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match="the disk is full"):
        make_checkpoint(tmp_path / "deep" / "out", tiny())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        make_checkpoint(tmp_path / "used", tiny())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run_cli(["make-checkpoint", out, "--like", "mixtral-tiny", "--layers", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["shards"] == 1
    assert load_checkpoint(tmp_path / "out").config["num_hidden_layers"] == 2
    assert run_cli(["make-checkpoint", out, "--like", "mixtral-tiny"]) == 3
    assert run_cli(["make-checkpoint", out]) == 3
    assert "give exactly one of --like and --config" in capsys.readouterr().err
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny()))
    assert run_cli(["make-checkpoint", str(tmp_path / "other"), "--config", str(config)]) == 0
    assert "none: the vocabulary" in capsys.readouterr().out
