"""Reading checkpoints: names, dtypes, streaming, digests; and everything a bad one can be."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.errors import CheckpointError, UnsupportedModelError
from llmopt.frontend import capture, load_checkpoint
from llmopt.frontend.shards import read_shard
from tests.architectures import ARCHITECTURES, VOCAB, make_checkpoint, make_model
from tests.frontend.running import captured_logits, eager_model, relative_error

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama checkpoint in two shards."""
    path = tmp_path_factory.mktemp("sound")
    make_model(ARCHITECTURES["llama"]()).save_pretrained(path, max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").exists()
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def rewrite(file: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def test_weights_equal_safetensors(sound: Path) -> None:
    checkpoint = load_checkpoint(sound)
    for file in shards(sound):
        for name, tensor in load_file(file).items():
            assert torch.equal(checkpoint.weights[name].tensor(), tensor)
            if tensor.dim() > 1:
                assert torch.equal(checkpoint.weights[name].read(3, 7), tensor[3:7])
                assert torch.equal(torch.cat(list(checkpoint.weights[name].chunks(1000))), tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float32])
def test_dtypes_and_odd_shapes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(35).reshape(5, 7).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    for name, stored in read_shard(tmp_path / "x.safetensors").items():
        assert stored.shape == tuple(tensors[name].shape)
        assert torch.equal(stored.tensor(), tensors[name])


def test_rows_are_streamed(tmp_path: Path) -> None:
    """Reading a few rows of a 64 MB tensor allocates no more than those rows."""
    save_file({"big": torch.zeros(16384, 1024)}, tmp_path / "x.safetensors")
    stored = read_shard(tmp_path / "x.safetensors")["big"]
    tracemalloc.start()
    for start in range(0, 16384, 256):
        stored.read(start, start + 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 256 * 1024 * 4


def test_digest_ignores_the_path_and_sees_every_byte(copy: Path, sound: Path) -> None:
    first = load_checkpoint(sound).digest
    assert load_checkpoint(copy).digest == first
    file = shards(copy)[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert load_checkpoint(copy).digest != first


def test_digest_sees_the_config(copy: Path, sound: Path) -> None:
    change_config(copy, rms_norm_eps=1e-3)
    assert load_checkpoint(copy).digest != load_checkpoint(sound).digest


def test_tokenizer_files(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    (copy / "chat_template.jinja").write_text("x")
    assert set(load_checkpoint(copy).tokenizer_files) == {"tokenizer.json", "chat_template.jinja"}


def nan_in_norm(path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor.view(-1)[-1] = float("nan")

    rewrite(shards(path)[0], change)


def truncate(path: Path) -> None:
    file = shards(path)[0]
    file.write_bytes(file.read_bytes()[:-100])


def lie_about_length(path: Path) -> None:
    file = shards(path)[0]
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])


def garble_header(path: Path) -> None:
    file = shards(path)[0]
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"!" + data[9:])


def only_pickles(path: Path) -> None:
    for file in shards(path):
        file.unlink()
    (path / "model.safetensors.index.json").unlink()
    (path / "pytorch_model.bin").write_bytes(b"x")


def escape(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: "../" + file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))


def misplace(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = shards(path)[0].name
    index.write_text(json.dumps(content))


def drop(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda p: shards(p)[0].unlink(), "model-00001.*shard is missing"),
    "truncated shard": (truncate, "model-00001.*truncated"),
    "empty shard": (lambda p: shards(p)[0].write_bytes(b""), "truncated"),
    "false header length": (lie_about_length, "header of"),
    "garbled header": (garble_header, "damaged safetensors header"),
    "pickle weights": (only_pickles, "only pickle weights"),
    "no weights": (lambda p: [only_pickles(p), (p / "pytorch_model.bin").unlink()], "neither"),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "config no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json: unreadable"),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), "JSON object"),
    "config no UTF-8": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe"), "unreadable"),
    "remote code": (lambda p: change_config(p, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "no model type": (lambda p: change_config(p, model_type=None), "model_type"),
    "shard outside": (escape, "outside the checkpoint"),
    "index names a ghost": (misplace, "model.ghost.weight is missing"),
}
BAD_AT_CAPTURE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensor not in the index": (drop, "model.norm.weight is missing"),
    "shape against config": (
        lambda p: change_config(p, intermediate_size=80),
        r"model-0000.*mlp\.\w+_proj\.\w+ is \[.*\], the config asks for \[",
    ),
    "invalid config": (lambda p: change_config(p, num_attention_heads="four"), "config"),
}


@pytest.mark.parametrize("bad", sorted(BAD))
def test_bad_checkpoint(bad: str, copy: Path) -> None:
    damage, message = BAD[bad]
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(copy)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", sorted(BAD_AT_CAPTURE))
def test_bad_at_capture(bad: str, copy: Path) -> None:
    damage, message = BAD_AT_CAPTURE[bad]
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        capture(load_checkpoint(copy))
    assert "\n" not in str(caught.value)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load_checkpoint(tmp_path / "nothing")


def test_nan_is_named_when_read(copy: Path) -> None:
    nan_in_norm(copy)
    module = capture(load_checkpoint(copy)).module
    damaged = set(load_file(shards(copy)[0]))
    for name, weight in module.weights.items():
        if name in damaged:
            with pytest.raises(CheckpointError, match=f"{shards(copy)[0].name}: tensor {name} holds NaN"):
                weight.tensor()
        else:
            weight.tensor()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.ones(40, 8, dtype=dtype)
    tensor[17, 3] = value
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    stored = read_shard(tmp_path / "x.safetensors")["x"]
    stored.read(0, 17)
    with pytest.raises(CheckpointError, match=r"tensor x holds NaN or infinity in rows 16\.\.31"):
        stored.read(16, 32)


def test_unknown_architecture(copy: Path) -> None:
    change_config(copy, model_type="hyperllama", architectures=["HyperLlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="unknown architecture 'hyperllama'"):
        capture(load_checkpoint(copy))


def test_quantized_checkpoint(copy: Path) -> None:
    change_config(copy, quantization_config={"quant_method": "hqq"})
    with pytest.raises(UnsupportedModelError, match="quantized by 'hqq' are not read \\(known: awq, "):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_fused_and_apart(name: str, tmp_path: Path) -> None:
    """Per-expert tensors (older checkpoints) and fused ones (as in memory) give the same logits, lazily."""
    apart = make_checkpoint(name, tmp_path / "apart")
    fused = tmp_path / "fused"
    shutil.copytree(apart, fused)
    model = eager_model(apart)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, fused / "model.safetensors")
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    kinds = set()
    for path in (apart, fused):
        checkpoint = load_checkpoint(path)
        module = capture(checkpoint).module
        kinds.add(any(".experts.0." in tensor for tensor in checkpoint.weights))
        assert relative_error(captured_logits(module, ids), expected) <= 1e-5
        experts = module.weights["model.layers.0.mlp.experts.gate_up_proj"]
        assert torch.equal(torch.cat(list(experts.chunks(1))), experts.tensor())
    assert kinds == {True, False}


def test_names_without_the_prefix(tmp_path: Path) -> None:
    """GPT-2's original file lacks the ``transformer.`` prefix and holds mask buffers."""
    path = make_checkpoint("gpt2", tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = eager_model(path)(ids).logits
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    module = capture(load_checkpoint(path)).module
    assert "wte.weight" in module.weights
    assert relative_error(captured_logits(module, ids), expected) <= 1e-5
