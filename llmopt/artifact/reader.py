"""Opening an artifact: the format and every digest are checked before anything is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llmopt.artifact.digest import bad_chunks, sha256_file, tree_digest
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
    """An opened artifact. ``weights_path`` is its weights.safetensors, inside or where it was attached."""

    path: Path
    manifest: Manifest
    program: Program
    weights_path: Path

    @staticmethod
    def open(path: Path | str, *, weights: Path | str | None = None, verify: bool = True) -> Artifact:
        """Open a directory. ``weights``: a directory holding the weights.safetensors the manifest names by digest.

        ``verify`` False skips the digests of files and weights (sizes, format and manifest are always checked).
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
        _check_weights(source, manifest.weights, verify)
        return Artifact(root, manifest, program, source)

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


def _check_weights(path: Path, entry: WeightsEntry, verify: bool) -> None:
    where = path.name if entry.kind != "external" else str(path)
    _check_size(path, where, entry.bytes)
    if len(entry.chunks) != -(-entry.bytes // entry.chunk_bytes) or tree_digest(entry.chunks) != entry.digest:
        raise ArtifactError("the digests of the weights contradict each other", where=MANIFEST)
    if not verify:
        return
    if bad := bad_chunks(path, entry.chunk_bytes, entry.chunks):
        tensors = _tensors_in(path, bad[0] * entry.chunk_bytes, entry.chunk_bytes)
        what = f"chunk {bad[0]} of {len(entry.chunks)} ({tensors}) is not what the manifest names"
        raise ArtifactError(f"{what}: expected sha256 {entry.chunks[bad[0]]}", where=where)


def _tensors_in(path: Path, start: int, length: int) -> str:
    """Names of the tensors a chunk overlaps, for the message."""
    try:
        entries = read_layout(path).entries
    except ArtifactError:
        return "header"
    names = [n for n, e in entries.items() if e.offset < start + length and e.offset + e.nbytes > start]
    return ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])]) or "header"
