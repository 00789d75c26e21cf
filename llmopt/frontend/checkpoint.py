"""A Hugging Face checkpoint on disk: config, lazy weights, tokenizer files, digest."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmopt.errors import CheckpointError
from llmopt.frontend.quantized import read_quantized, reader_for
from llmopt.frontend.shards import Stored, read_shard
from llmopt.ir.weights import Weight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory. ``weights`` are the stored tensors by their names in the files.

    Where they are stored quantized, ``weights`` holds each layer's weight as one, by the name it would have, and
    ``stored`` the tensors of the files.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    weights: dict[str, Weight]
    tokenizer_files: dict[str, Path]
    stored: dict[str, Weight] | None = None

    @property
    def files(self) -> dict[str, Weight]:
        """The tensors as the files hold them."""
        return self.weights if self.stored is None else self.stored

    @cached_property
    def digest(self) -> str:
        """sha256 over the configs, the tensors' names, dtypes and shapes, and the shards' bytes.

        Independent of where the directory lies. Reads every shard once, at first use (1.3 GB/s a core).
        """
        total = hashlib.sha256()
        for part in (self.config, self.generation_config):
            total.update(json.dumps(part, sort_keys=True).encode())
        for name, weight in sorted(self.files.items()):
            total.update(f"{name} {weight.dtype} {weight.shape}\n".encode())
        files = sorted({w.file for w in self.files.values() if isinstance(w, Stored)})
        with ThreadPoolExecutor(max_workers=2) as pool:
            for file, digest in zip(files, pool.map(file_digest, files)):
                total.update(f"{file.name} {digest}\n".encode())
        return total.hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a file, streamed."""
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=str(file)) from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint's headers (no tensor data).

    Raises CheckpointError when a file is missing, damaged or unsafe (pickle weights, code in ``auto_map``),
    UnsupportedModelError when it is quantized in a way llmopt does not read.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError("no such checkpoint directory", where=str(path))
    config = read_json(path / "config.json")
    refuse(path, config)
    generation = path / "generation_config.json"
    stored, reader = read_weights(path), reader_for(config, path)
    return Checkpoint(
        path=path,
        config=config,
        generation_config=read_json(generation) if generation.exists() else {},
        weights=stored if reader is None else read_quantized(reader, stored, path),
        tokenizer_files={name: path / name for name in TOKENIZER_FILES if (path / name).is_file()},
        stored=None if reader is None else stored,
    )


def refuse(path: Path, config: dict[str, Any]) -> None:
    """Raise on configs llmopt does not read: remote code, no model type."""
    where = str(path / "config.json")
    if "auto_map" in config:
        raise CheckpointError(
            "auto_map asks to run code from the checkpoint", where=where, hint="llmopt never runs a checkpoint's code"
        )
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError("model_type is missing", where=where)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.name} is missing", where=str(file.parent)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"unreadable: {error}", where=str(file)) from error
    if not isinstance(value, dict):
        raise CheckpointError("expected a JSON object", where=str(file))
    return value


def read_weights(path: Path) -> dict[str, Weight]:
    """Every tensor of the checkpoint's shards."""
    if not (path / INDEX).exists():
        if (path / SINGLE).exists():
            return dict(read_shard(path / SINGLE))
        if any(next(path.glob(pattern), None) for pattern in PICKLES):
            raise CheckpointError(
                "only pickle weights found", where=str(path), hint="pickle can run code; convert to safetensors first"
            )
        raise CheckpointError(f"neither {SINGLE} nor {INDEX} found", where=str(path))
    placed = read_json(path / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise CheckpointError("weight_map is missing or malformed", where=str(path / INDEX))
    weights: dict[str, Weight] = {}
    for shard in sorted(set(placed.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"shard {shard!r} lies outside the checkpoint", where=str(path / INDEX))
        found = read_shard(path / shard)
        for name in (name for name, file in placed.items() if file == shard):
            if name not in found:
                raise CheckpointError(f"tensor {name} is missing", where=str(path / shard))
            weights[name] = found[name]
    return weights
