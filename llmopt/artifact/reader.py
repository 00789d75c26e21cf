"""Opening an artifact: the format and every digest are checked before anything is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from llmopt.artifact.chunks import Chunks
from llmopt.artifact.digest import sha256_file
from llmopt.artifact.manifest import FileEntry, Manifest, WeightsEntry
from llmopt.artifact.stores import FileStore, RandomStore
from llmopt.artifact.tensorfile import read_layout
from llmopt.errors import ArtifactError
from llmopt.program import Program
from llmopt.target import WeightStore

MANIFEST, PROGRAM, REPORT, RECIPE, WEIGHTS = (
    "manifest.json",
    "program.json",
    "report.json",
    "recipe.yaml",
    "weights.safetensors",
)


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. ``weights_path`` is its weights.safetensors, inside or where it was attached; ``unchecked``
    the digests of its chunks, when they were deferred."""

    path: Path
    manifest: Manifest
    program: Program
    weights_path: Path
    unchecked: Chunks | None = None

    @staticmethod
    def open(
        path: Path | str, *, weights: Path | str | None = None, verify: bool = True, defer: bool = False
    ) -> Artifact:
        """Open a directory. ``weights``: a directory holding the weights.safetensors the manifest names by digest.

        ``verify`` False skips the digests of files and weights (sizes, format and manifest are always checked).
        ``defer``: leave the digests of the weights to ``load_executor``, which may check them while it copies.
        Raises ArtifactError saying what was expected and what was found, in which file.
        """
        root = Path(path)
        manifest = Manifest.from_json(_read_text(root, MANIFEST))
        for name, entry in manifest.files.items():
            _check_size(inside(root, name), name, entry.bytes)
        if verify:
            _check_files(root, manifest.files)
        program = Program.from_json(_read_text(root, PROGRAM))
        source = _weights_file(root, manifest.weights, Path(weights) if weights is not None else None)
        named = source.name if manifest.weights.kind != "external" else str(source)
        chunks = Chunks(source, manifest.weights, named)
        _check_size(source, named, manifest.weights.bytes)
        chunks.check_consistent()
        opened = Artifact(root, manifest, program, source, chunks if verify else None)
        return opened if defer else opened.checked()

    def checked(self) -> Artifact:
        """The artifact once the digests of its weights are checked; raises ArtifactError."""
        if self.unchecked is not None:
            self.unchecked.check_all()
        return replace(self, unchecked=None)

    def file(self, name: str) -> Path:
        """Path of a file of the artifact; raises ArtifactError when the manifest does not list it."""
        if name not in self.manifest.files:
            raise ArtifactError(f"the artifact holds no {name}", where=str(self.path))
        return inside(self.path, name)

    def has_file(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in self.manifest.files

    def weight_store(self) -> WeightStore:
        """The weights, mapped or drawn from the manifest's seed."""
        store = FileStore(self.weights_path, read_layout(self.weights_path).entries)
        entry = self.manifest.weights
        return RandomStore(entry.seed, entry.random, store) if entry.kind == "random" else store

    def report(self) -> dict[str, Any]:
        """report.json."""
        return dict(json.loads(self.file(REPORT).read_text("utf-8")))


def inside(root: Path, name: str) -> Path:
    """``root / name``; raises ArtifactError when that is not below ``root`` (absolute, .., symlink)."""
    parts = PurePosixPath(name).parts
    plain = parts and ".." not in parts and "\\" not in name and ":" not in name and "\0" not in name
    if not plain or PurePosixPath(name).is_absolute() or str(PurePosixPath(name)) != name:
        raise ArtifactError(f"file name {name!r} leaves the artifact", where=str(root))
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(f"file {name} is a link out of the artifact", where=str(root))
    return path


def _read_text(root: Path, name: str) -> str:
    try:
        return inside(root, name).read_bytes().decode()
    except FileNotFoundError as error:
        what = f"{name} is missing" if root.is_dir() else "no such artifact"
        raise ArtifactError(what, where=str(root)) from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"expected UTF-8, found byte {error.object[error.start]:#x}", where=name) from error
    except OSError as error:
        raise ArtifactError(f"cannot read: {error.strerror}", where=str(root / name)) from error


def _check_size(path: Path, name: str, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"cannot read: {error.strerror}", where=name) from error
    if found != expected or not path.is_file():
        raise ArtifactError(f"expected {expected} bytes, found {found}", where=name)


def _check_files(root: Path, files: Mapping[str, FileEntry]) -> None:
    with ThreadPoolExecutor() as pool:
        found = pool.map(sha256_file, [root / name for name in files])
        for (name, entry), digest in zip(files.items(), found):
            if digest != entry.sha256:
                raise ArtifactError(f"expected sha256 {entry.sha256}, found {digest}", where=name)


def _weights_file(root: Path, entry: WeightsEntry, attached: Path | None) -> Path:
    if entry.kind != "external":
        if attached is not None:
            raise ArtifactError(f"its weights are {entry.kind}: none can be attached", where=str(root))
        return inside(root, WEIGHTS)
    if attached is None:
        hint = "give the directory that holds them (--weights DIR)"
        raise ArtifactError(f"weights {entry.digest[:16]}… are not in the artifact", where=str(root), hint=hint)
    if not (attached / WEIGHTS).is_file():
        raise ArtifactError(f"expected {WEIGHTS}, found none", where=str(attached))
    return attached / WEIGHTS
