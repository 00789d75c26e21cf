"""A directory that appears whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmopt.errors import ArtifactError


@contextmanager
def staged(destination: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A fresh directory beside ``destination`` that takes its place when the block ends without an error.

    On any error, Ctrl-C included, it is removed together with the parents made for it. An existing ``destination``
    must be an empty directory or ``replaceable``, else ArtifactError; it stays until the new one is complete.
    """
    destination = destination.resolve()
    _refuse(destination, replaceable)
    _sweep(destination)
    made = _make_parents(destination.parent)
    aside = destination.parent / f".{destination.name}.part-{os.getpid()}"
    try:
        aside.mkdir()
        yield aside
        sync_directory(aside)
        _swap(aside, destination)
        sync_directory(destination.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _refuse(destination: Path, replaceable: Callable[[Path], bool]) -> None:
    if not destination.exists():
        return
    if not destination.is_dir():
        raise ArtifactError("a file is in the way", where=str(destination))
    if any(destination.iterdir()) and not replaceable(destination):
        hint = "give another destination; only an empty directory or an artifact is replaced"
        raise ArtifactError("the directory holds something else", where=str(destination), hint=hint)


def _sweep(destination: Path) -> None:
    """Remove what builds of this destination left when they were killed: their process is gone."""
    for left in destination.parent.glob(f".{glob.escape(destination.name)}.part-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; those made, innermost first."""
    made: list[Path] = []
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    for path in reversed(missing):
        path.mkdir()
        made.insert(0, path)
    return made


def _swap(aside: Path, destination: Path) -> None:
    """Rename into place; an old directory is moved away first and comes back should the rename fail."""
    if not destination.exists():
        aside.rename(destination)
        return
    old = aside.with_name(f"{aside.name}-old")
    destination.rename(old)
    try:
        aside.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    shutil.rmtree(old)


def sync_directory(directory: Path) -> None:
    """fsync a directory, so that its entries survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
