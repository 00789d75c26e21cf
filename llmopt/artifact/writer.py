"""Writing an artifact: aside, checked, synced, then renamed; on any error nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import llmopt
from llmopt.artifact.digest import CHUNK_BYTES, sha256, tree_digest
from llmopt.artifact.manifest import FileEntry, Golden, Manifest, WeightsEntry, describe_states
from llmopt.artifact.randomize import randomize
from llmopt.artifact.reader import MANIFEST, PROGRAM, RECIPE, REPORT, WEIGHTS, Artifact, inside
from llmopt.artifact.staging import staged
from llmopt.artifact.tensorfile import plan_layout, write_tensors
from llmopt.errors import ArtifactError, ResourceError
from llmopt.program import Program
from llmopt.target import TargetFiles, WeightReader

Progress = Callable[[str, int, int], None]
LIBRARIES = ("numpy", "onnx", "onnxruntime", "torch", "transformers")


@dataclass(frozen=True)
class WeightsPlan:
    """Where the weights go: into the artifact, into ``directory`` beside it (attached by digest), or nowhere:
    drawn from ``seed`` at load (for benchmarks)."""

    kind: Literal["embedded", "external", "random"] = "embedded"
    directory: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class BuildInfo:
    """What the manifest says about the build. ``source``: digest of the checkpoint; ``dtype``: compute dtype."""

    model: str
    target: str
    dtype: str
    source: str
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())
    accuracy: Mapping[str, Any] = field(default_factory=dict)


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of llmopt and of the libraries that are installed."""
    from importlib import metadata  # 30 ms the runtime, which only reads, need not pay

    found = {"llmopt": llmopt.__version__}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_artifact(
    destination: Path | str,
    *,
    info: BuildInfo,
    program: Program,
    files: TargetFiles,
    tokenizer_files: Mapping[str, Path | bytes],
    recipe_text: str,
    report: str,
    extra_files: Mapping[str, bytes] | None = None,
    weights: WeightsPlan = WeightsPlan(),
    golden: Sequence[Golden] | Callable[[Artifact], Sequence[Golden]] = (),
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Write the artifact directory ``destination`` and return its manifest.

    ``report`` is the text of report.json; ``extra_files`` by path (``ir/00-capture.txt``). ``golden`` may be a
    function of the finished but not yet published artifact. An existing artifact is replaced. Raises
    ArtifactError when ``destination`` is something else, ResourceError when the disk is full.
    """
    target = Path(destination)
    with ExitStack() as stack:
        stack.enter_context(disk_errors(target))
        root = home = stack.enter_context(staged(target, replaceable=_is_artifact))
        if weights.kind == "external":
            if weights.directory is None:
                raise ArtifactError("external weights need a directory to be written to", where=str(target))
            home = stack.enter_context(staged(weights.directory, replaceable=_holds_weights))
        contents = {PROGRAM: program.to_json().encode(), RECIPE: recipe_text.encode(), REPORT: report.encode()}
        _collect(contents, target, files.files, tokenizer_files, extra_files or {})
        entries = {name: _write_file(root, name, data) for name, data in sorted(contents.items())}
        entry = _write_weights(home, weights, program, files.weights, progress)
        manifest = _manifest(info, program, dict(files.notes), entries, entry)
        if callable(golden):
            golden = golden(Artifact(root, manifest, program, home / WEIGHTS))
        manifest = manifest.with_golden(list(golden))
        _write_file(root, MANIFEST, manifest.to_json().encode())
    return manifest


@contextmanager
def disk_errors(destination: Path) -> Iterator[None]:
    """Turns the operating system's write errors into ResourceError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"cannot write: {error.strerror or error}"
        raise ResourceError(what, where=str(error.filename or destination)) from error


def _is_artifact(path: Path) -> bool:
    """Whether a directory may be replaced: it holds a manifest of ours, of any format."""
    try:
        return '"entry_points"' in (path / MANIFEST).read_text("utf-8") and (path / PROGRAM).is_file()
    except (OSError, UnicodeDecodeError):
        return False


def _holds_weights(path: Path) -> bool:
    """Whether a directory of external weights may be replaced: it holds nothing else."""
    return {entry.name for entry in path.iterdir()} <= {WEIGHTS}


def _write_file(root: Path, name: str, data: bytes) -> FileEntry:
    path = inside(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(data), sha256(data))


def _collect(contents: dict[str, bytes], target: Path, *groups: Mapping[str, Path | bytes]) -> None:
    """Add the files of each group; two of one name are an error."""
    for group in groups:
        for name, data in group.items():
            if name in contents or name in (MANIFEST, WEIGHTS):
                raise ArtifactError(f"two files of the artifact are named {name}", where=str(target))
            contents[name] = data if isinstance(data, bytes) else data.read_bytes()


def _manifest(
    info: BuildInfo, program: Program, notes: dict[str, Any], files: dict[str, FileEntry], weights: WeightsEntry
) -> Manifest:
    return Manifest(
        model=info.model,
        target=info.target,
        dtype=info.dtype,
        source=info.source,
        versions=dict(info.versions),
        dims=program.dims,
        states=describe_states(program.states),
        entry_points=program.entry_points,
        max_context=program.max_context,
        vocab_size=program.vocab_size,
        eos_token_ids=info.eos_token_ids,
        bos_token_id=info.bos_token_id,
        golden=[],
        notes=notes,
        files=files,
        weights=weights,
        accuracy=dict(info.accuracy),
    )


def _write_weights(
    home: Path, plan: WeightsPlan, program: Program, readers: Mapping[str, WeightReader], progress: Progress
) -> WeightsEntry:
    """Write weights.safetensors below ``home``: all tensors, or those no seed can stand in for."""
    random = randomize(program, readers) if plan.kind == "random" else {}
    kept = {name: reader for name, reader in readers.items() if name not in random}
    sources = {name: weight.parts[0].name for name, weight in program.weights.items() if weight.parts}
    size, chunks = _stream(home, kept, sources, progress)
    return WeightsEntry(plan.kind, size, tree_digest(chunks), CHUNK_BYTES, chunks, plan.seed, random)


def _stream(
    root: Path, readers: Mapping[str, WeightReader], sources: Mapping[str, str], progress: Progress
) -> tuple[int, tuple[str, ...]]:
    """Write weights.safetensors below ``root``; its size and chunk digests."""
    size = plan_layout({name: reader.type for name, reader in readers.items()}).size
    if (free := shutil.disk_usage(root).free) < size:
        what = f"the disk is full: weights need {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise ResourceError(what, where=str(root.parent))
    with (root / WEIGHTS).open("wb") as file:
        _, chunks = write_tensors(file, readers, progress, sources)
        file.flush()
        os.fsync(file.fileno())
    return size, chunks
