"""Checkpoints of random weights in the shape of a known model, streamed to safetensors shards."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.artifact.dtypes import numpy_dtype
from llmopt.artifact.manifest import RandomTensor
from llmopt.artifact.staging import staged
from llmopt.artifact.stores import draw_pool
from llmopt.artifact.tensorfile import nbytes, write_tensors
from llmopt.artifact.writer import disk_errors
from llmopt.errors import ConfigError, ResourceError
from llmopt.frontend.blueprint import Blueprint
from llmopt.frontend.bytelevel import tokenizer_files
from llmopt.program import TensorType

Progress = Callable[[str, int, int], None]
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class RandomReader:
    """A random tensor as row chunks, drawn from the seed and its name; never whole in memory."""

    name: str
    tensor: RandomTensor
    seed: int
    offset: npt.NDArray[np.float32] | None = None
    """Added to the values: a small tensor's own initialization."""

    @property
    def type(self) -> TensorType:
        """Shape and dtype."""
        return TensorType(self.tensor.shape, self.tensor.dtype)

    def pool(self) -> npt.NDArray[Any]:
        """The values it repeats (not kept: a checkpoint has hundreds of tensors)."""
        values = draw_pool(self.seed, self.name, self.tensor)
        if self.offset is None:
            return values
        return (values.astype(np.float32) + self.offset.reshape(-1)).astype(numpy_dtype(self.tensor.dtype))

    def chunks(self, max_bytes: int) -> Iterator[npt.NDArray[Any]]:
        """Rows in order, each chunk at most ``max_bytes`` (one row at least)."""
        pool = self.pool()
        rows, row = (self.tensor.shape or (1,))[0], math.prod(self.tensor.shape[1:])
        step = max(1, max_bytes // max(1, row * pool.itemsize))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            flat = np.resize(np.roll(pool, -start * row), (stop - start) * row)
            yield flat.reshape(stop - start, *self.tensor.shape[1:])


@dataclass(frozen=True)
class Made:
    """What was written: bytes of weights, parameters, shards, and whether there is a tokenizer."""

    bytes: int
    parameters: int
    shards: int
    tokenizer: bool


def make_checkpoint(
    destination: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Made:
    """Write a checkpoint directory of random weights: a function of config, seed and dtype alone.

    Matrices are drawn with the config's ``initializer_range``; norms, biases and sinks are the model's own
    initialization plus noise of that size, so that none is neutral. Raises ConfigError when ``destination`` is in use
    or the config builds no decoder, ResourceError when the disk is full; nothing is left behind then.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError("the destination exists and is not empty", where=str(destination))
    blueprint = Blueprint.of(config, dtype)
    readers = {
        name: RandomReader(name, RandomTensor(blueprint.dtypes[name], shape, ("normal", 0.0, blueprint.spread)), seed,
                           blueprint.small.get(name))
        for name, shape in blueprint.shapes.items()
    }  # fmt: skip
    files = tokenizer_files(blueprint.config)
    with disk_errors(destination), staged(destination, replaceable=lambda path: False) as root:
        shards = split_shards(readers)
        total = sum(nbytes(reader.type) for reader in readers.values())
        if (free := shutil.disk_usage(root).free) < total:
            raise ResourceError(f"the disk is full: {total / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
                                where=str(destination))  # fmt: skip
        write_shards(root, shards, total, progress)
        texts = {"config.json": blueprint.config, "generation_config.json": special_ids(blueprint.config)}
        for name, value in texts.items():
            (root / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, text in files.items():
            (root / name).write_text(text, encoding="utf-8")
    parameters = sum(math.prod(shape) for shape in blueprint.shapes.values())
    return Made(total, parameters, len(shards), bool(files))


def split_shards(readers: Mapping[str, RandomReader]) -> list[dict[str, RandomReader]]:
    """Tensors in name order, at most SHARD_BYTES a shard (one tensor at least)."""
    shards: list[dict[str, RandomReader]] = [{}]
    size = 0
    for name, reader in sorted(readers.items()):
        need = nbytes(reader.type)
        if shards[-1] and size + need > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = reader
        size += need
    return shards


def write_shards(root: Path, shards: list[dict[str, RandomReader]], total: int, progress: Progress) -> None:
    """The safetensors files, and their index when there are several."""
    places: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(shard, name)
        before = done

        def report(what: str, here: int, size: int, before: int = before) -> None:
            progress("writing weights", min(before + here, total), total)

        with (root / name).open("wb") as file:
            write_tensors(file, shard, report, alignment=1)
            file.flush()
            os.fsync(file.fileno())
        done += sum(nbytes(reader.type) for reader in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def special_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the special tokens the config names."""
    return {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
