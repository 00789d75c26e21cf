"""Tensors on disk, written atomically: what a calibration computed, readable as lazy weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt.errors import ResourceError
from llmopt.ir.weights import Weight
from llmopt.program import WeightPart


class Spool:
    """A folder of tensor files that belongs to one computation.

    ``key`` says which; a folder left by another one, or by none, is emptied. Writing renames, so that a file is
    there whole or not at all.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        mark = folder / "key"
        if not mark.is_file() or mark.read_text("utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            with write_errors(folder):
                folder.mkdir(parents=True)
                replace_text(mark, key)

    def saved(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> SavedSet:
        """A named set of tensors, computed and saved unless it is there."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            save_atomically(path, compute())
        return SavedSet(path)


@dataclass(frozen=True)
class SavedSet:
    """A saved set of tensors."""

    path: Path

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        with safe_open(self.path, framework="pt") as opened:
            return sorted(opened.keys())

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        with safe_open(self.path, framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        return load_file(self.path)


@dataclass(frozen=True)
class Spooled(Weight):
    """A saved tensor, read in rows; ``made_from``: the checkpoint tensors in its rows."""

    file: Path
    name: str
    made_from: tuple[WeightPart, ...] = ()

    def __post_init__(self) -> None:
        with safe_open(self.file, framework="pt") as opened:
            first = opened.get_slice(self.name)
            object.__setattr__(self, "shape", tuple(first.get_shape()))
            object.__setattr__(self, "dtype", first[:0].dtype)

    def read(self, start: int, stop: int) -> Tensor:
        with safe_open(self.file, framework="pt") as opened:
            rows: Tensor = opened.get_slice(self.name)[start:stop]
        return rows

    def parts(self) -> tuple[WeightPart, ...]:
        return self.made_from


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into ResourceError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"cannot keep what calibration computed: {error}", where=str(path)) from error


def save_atomically(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file aside, then rename it."""
    aside = path.with_suffix(".partial")
    with write_errors(path):
        save_file({name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}, aside)
        os.replace(aside, path)


def replace_text(path: Path, text: str) -> None:
    """Write a text file aside, then rename it."""
    aside = path.with_suffix(".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def scalar(value: int) -> Tensor:
    """An integer as a tensor."""
    return torch.tensor(value, dtype=torch.int64)
