"""A bundle of candidates: a folder with cubins and how to launch and check each, which the timing reads (no Triton)."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmopt.errors import ArtifactError
from llmopt.launch import Cubin, Launch, Pointer, Scalar, TensorMap

FORMAT = 2
FILE = "bundle.json"
OPERANDS: dict[str, Any] = {kind.__name__: kind for kind in (Pointer, Scalar, TensorMap)}


@dataclass(frozen=True)
class Buffer:
    """A buffer of an entry. ``kind``: ``pool`` (moves through memory from launch to launch), ``random`` (filled once),
    ``data`` (holds ``data``, integers) or ``zero`` (scratch)."""

    bytes: int
    kind: str
    dtype: str = "uint8"
    data: tuple[int, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One configuration of a kernel for a call. ``bytes`` and ``flops``: what it must move and do at least.

    ``check``: how to compare with float64, ``{"m": …, "n": …, "k": …, "gate": …, "residual": …}`` of a linear, None
    where configurations of one key are only compared with each other. ``out``: the buffer of the result, its dtype
    and elements.
    """

    model: str
    what: str
    kernel: str
    key: str
    config: dict[str, Any]
    bytes: int
    flops: int
    buffers: dict[str, Buffer]
    launches: tuple[Launch, ...]
    out: tuple[str, str, int]
    check: dict[str, Any] | None = None


@dataclass
class Bundle:
    """Entries and their cubins, made by one compiler ("triton 3.9.0") for one architecture."""

    folder: Path
    arch: int
    compiler: str
    cuda: int
    cubins: dict[str, Cubin] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def add_cubin(self, name: str, cubin: Cubin, data: bytes) -> None:
        """Write a cubin."""
        path = self.folder / cubin.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.cubins[name], self.digests[name] = cubin, hashlib.sha256(data).hexdigest()

    def write(self) -> None:
        """Write the description, last: a folder without it is no bundle."""
        raw = {
            "format": FORMAT, "arch": self.arch, "compiler": self.compiler, "cuda": self.cuda,
            "cubins": {name: asdict(cubin) for name, cubin in self.cubins.items()}, "digests": self.digests,
            "entries": [written(entry) for entry in self.entries],
        }  # fmt: skip
        (self.folder / FILE).write_text(json.dumps(raw, sort_keys=True), "utf-8")

    def read_cubin(self, file: str) -> bytes:
        """A cubin. Raises ArtifactError when it is missing or not what was built."""
        name = next(name for name, cubin in self.cubins.items() if cubin.file == file)
        try:
            data = (self.folder / file).read_bytes()
        except OSError as error:
            raise damaged(self.folder, f"{file} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != self.digests[name]:
            raise damaged(self.folder, f"{file} is not what was built")
        return data


def written(entry: Entry) -> dict[str, Any]:
    """An entry as JSON; operands headed by their kind, what buffers hold packed: block tables of a long context are
    long and regular."""
    launches = [{**asdict(x), "args": [[type(a).__name__, asdict(a)] for a in x.args]} for x in entry.launches]
    buffers = {name: {**asdict(b), "data": packed(b.data)} for name, b in entry.buffers.items()}
    return {**asdict(entry), "buffers": buffers, "launches": launches}


def packed(data: tuple[int, ...]) -> str:
    """Integers as text."""
    return base64.b64encode(zlib.compress(json.dumps(data).encode())).decode() if data else ""


def unpacked(text: str) -> tuple[int, ...]:
    """Inverse of ``packed``; raises ValueError for what is not its result."""
    try:
        return tuple(json.loads(zlib.decompress(base64.b64decode(text, validate=True)))) if text else ()
    except zlib.error as error:
        raise ValueError(str(error)) from error


def damaged(folder: Path, what: str) -> ArtifactError:
    """The error for a bundle that cannot be used."""
    return ArtifactError(what, where=str(folder), hint="make it again: llmopt tune --build-only")


def open_bundle(folder: Path) -> Bundle:
    """A bundle as written; cubins are checked when they are read. Raises ArtifactError for what is none, is damaged,
    or is of another format."""
    try:
        raw = json.loads((folder / FILE).read_text("utf-8"))
        if raw["format"] != FORMAT:
            raise damaged(folder, f"expected bundle format {FORMAT}, found {raw['format']}")
        cubins = {name: Cubin(**cubin) for name, cubin in raw["cubins"].items()}
        entries = [read_entry(entry) for entry in raw["entries"]]
        missing = {x.kernel for entry in entries for x in entry.launches} - set(raw["digests"]) | set(cubins) - set(
            raw["digests"]
        )
        if missing:
            raise damaged(folder, f"{FILE} names no cubin {min(missing)}")
        return Bundle(folder, raw["arch"], raw["compiler"], raw["cuda"], cubins, raw["digests"], entries)
    except OSError as error:
        raise damaged(folder, f"not a bundle of candidates: {FILE}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{FILE} is malformed: {error!r}") from error


def read_entry(raw: dict[str, Any]) -> Entry:
    """Inverse of ``written``."""
    buffers = {name: Buffer(**{**b, "data": unpacked(b["data"])}) for name, b in raw["buffers"].items()}
    launches = tuple(read_launch(x) for x in raw["launches"])
    name, dtype, count = raw["out"]
    return Entry(**{**raw, "buffers": buffers, "launches": launches, "out": (name, dtype, count)})


def read_launch(raw: dict[str, Any]) -> Launch:
    """A launch with its operands."""

    def operand(kind: str, fields: dict[str, Any]) -> Any:
        return OPERANDS[kind](**{n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()})

    grid = (raw["grid"][0], raw["grid"][1], raw["grid"][2])
    return Launch(**{**raw, "grid": grid, "args": tuple(operand(*arg) for arg in raw["args"])})
