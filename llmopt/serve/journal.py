"""Results of a long run on disk as they come: a killed run goes on where it was, and its output appears once, whole.

The journal is ``OUTPUT.partial``: a line that names the run, then ``LINE<tab>RESULT`` for every answered request, in
the order they were answered. The output is made from it in the order of the requests, under another name, and takes
its own by a rename; the journal goes last. Killed anywhere, a run is found complete, resumable or not begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from llmopt.artifact.staging import sync_directory
from llmopt.errors import ConfigError, ResourceError

SYNC_SECONDS = 1.0
"""Results younger than this may be lost to a power failure; a killed process loses none that it wrote."""


class Journal:
    """The results so far. ``done``: the number of a request's line → where its result is in the file."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._synced = time.monotonic()
        self.done: dict[int, tuple[int, int]] = {}

    def add(self, line: int, result: dict[str, Any]) -> None:
        """Write one result; it survives a kill once this returns."""
        data = json.dumps(result, ensure_ascii=False).encode()
        head = b"%d\t" % line
        self._file.seek(0, os.SEEK_END)
        self.done[line] = (self._file.tell() + len(head), len(data))
        self._file.write(head + data + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make the results survive a power failure too."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def publish(self, output: Path, lines: Sequence[int]) -> None:
        """Write the results of ``lines`` in that order to ``output``, at once, and remove the journal."""
        self.sync()
        aside = output.with_name(f".{output.name}.tmp")
        try:
            with aside.open("wb") as file:
                for line in lines:
                    start, size = self.done[line]
                    self._file.seek(start)
                    file.write(self._file.read(size) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            aside.replace(output)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_directory(output.parent)
        self._path.unlink()

    def load(self, name: dict[str, Any]) -> None:
        """Read what an earlier run left, or begin. A last line cut short by a kill is dropped.

        Raises ConfigError when the file is of another run than ``name``.
        """
        header = json.dumps(name, sort_keys=True).encode() + b"\n"
        self._file.seek(0)
        first = self._file.readline()
        if not first.endswith(b"\n"):  # new, or killed before the first line was whole
            self._file.seek(0)
            self._file.truncate()
            self._file.write(header)
            self._file.flush()
            return
        if first != header:
            what = "holds the results of another run: its requests, flags or artifact differ from these"
            raise ConfigError(what, where=str(self._path), hint="remove it to start over")
        good = self._file.tell()
        for raw in self._file:
            line, tab, result = raw.partition(b"\t")
            if not raw.endswith(b"\n") or not (line.isdigit() and tab and _is_json(result)):
                break
            self.done[int(line)] = (good + len(line) + 1, len(result) - 1)
            good += len(raw)
        self._file.seek(good)
        self._file.truncate()


@contextlib.contextmanager
def open_journal(output: Path, name: dict[str, Any]) -> Iterator[Journal]:
    """The journal of ``output``, begun or resumed, held by this process alone.

    ``name``: what makes two runs the same. Raises ConfigError for a journal of another run, ResourceError when
    another process writes it.
    """
    path = output.with_name(f"{output.name}.partial")
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResourceError("another process is writing this output", where=str(path)) from error
        journal = Journal(file, path)
        journal.load(name)
        sync_directory(path.parent)
        yield journal
        if path.exists():
            journal.sync()


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True
