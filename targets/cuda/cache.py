"""Content-addressed cache of cubins: the same source, specialization, arch and compiler give the same file."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llmopt.lower.cache import cache_folder, write_aside

from .kernel import Specialization
from .nvrtc import nvrtc_version, sources

FORMAT = "1"


@dataclass(frozen=True)
class Compiled:
    """A cubin and what the compiler says about it. ``tensor_maps``: box and swizzle of each TMA parameter."""

    cubin: bytes
    symbol: str
    threads: int
    shared: int
    registers: int
    spills: int
    tensor_maps: tuple[tuple[tuple[int, ...], int], ...] = ()


@dataclass(frozen=True)
class Job:
    """One cubin to have: a specialization on an arch, by a compiler version."""

    specialization: Specialization
    arch: int
    compiler: str

    @property
    def label(self) -> str:
        """Kernel and arch, for people."""
        spec = self.specialization
        constants = ", ".join(f"{k}={v}" for k, v in spec.constexprs)
        return f"{spec.module.rpartition('.')[2]}.{spec.function}({constants}) sm_{self.arch}"

    def identity(self) -> str:
        """Digest of what is asked for, whatever the source and compiler."""
        spec = {**asdict(self.specialization), "module": short_name(self.specialization.module), "arch": self.arch}
        for name in ("registers", "source", "shared"):  # newer than the digests that tables and logs hold
            if not spec[name]:
                del spec[name]
        return digest(json.dumps(spec, sort_keys=True))

    def parts(self) -> dict[str, str]:
        """What the cubin depends on beside its identity."""
        module, source = self.specialization.module, self.specialization.source
        if source:
            text = json.dumps(sources(module, source))
            compiler = source_digest(f"{__package__}.nvrtc")
            return {"source": digest(text), "nvrtc": nvrtc_version(), "worker": compiler, "format": FORMAT}
        worker = source_digest(f"{__package__}.worker")
        return {"source": source_digest(module), "triton": self.compiler, "worker": worker, "format": FORMAT}

    def key(self) -> str:
        """Name of the cache entry."""
        return digest(json.dumps([self.identity(), self.parts()], sort_keys=True))


def digest(text: str) -> str:
    """Hex sha256."""
    return hashlib.sha256(text.encode()).hexdigest()


def short_name(module: str) -> str:
    """A module's name inside its target's package: the same in the wheel and in the checkout."""
    return module.removeprefix(f"{__package__}.")


@cache
def source_digest(module: str) -> str:
    """Digest of a module's source and of everything it imports from this target's package."""
    texts: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if short_name(name) in texts:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        text = Path(spec.origin).read_text("utf-8")
        texts[short_name(name)] = text
        pending += imports(text, name)
    return digest(json.dumps(texts, sort_keys=True))


def imports(text: str, module: str) -> Iterator[str]:
    """Modules of the same top-level package that a module's source imports, absolute names."""
    top = module.partition(".")[0]
    package = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            if base.partition(".")[0] == top:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if exists(f"{base}.{alias.name}"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == top)


def exists(module: str) -> bool:
    """Whether a dotted name is a module (not a name inside one)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@dataclass
class CubinCache:
    """Entries ``<key>.cubin`` with ``<key>.json`` beside; ``last/<identity>.json`` says what was built last, so that a
    miss can be explained. ``log`` collects one line a miss."""

    folder: Path = field(default_factory=lambda: cache_folder() / "cubins")
    log: list[str] = field(default_factory=list)

    def get(self, job: Job) -> Compiled | None:
        """The entry, or None (and a line in the log saying why it has to be compiled)."""
        key = job.key()
        try:
            meta = json.loads((self.folder / f"{key}.json").read_text("utf-8"))
            cubin = (self.folder / f"{key}.cubin").read_bytes()
            if hashlib.sha256(cubin).hexdigest() == meta.pop("sha256"):
                maps = tuple((tuple(box), swizzle) for box, swizzle in meta.pop("tensor_maps"))
                return Compiled(cubin, **meta, tensor_maps=maps)
            reason = "its cache entry is damaged"
        except FileNotFoundError:
            reason = self._why(job)
        except (ValueError, KeyError, TypeError):
            reason = "its cache entry is damaged"
        self.log.append(f"compiled {job.label}: {reason}")
        return None

    def _why(self, job: Job) -> str:
        try:
            last = json.loads((self.folder / "last" / f"{job.identity()}.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return "never compiled before"
        changed = [name for name, value in job.parts().items() if last.get(name) != value]
        if not changed:
            return "its cache entry was removed"
        spec = job.specialization
        file = (
            f"{spec.source} or what it includes" if spec.source else f"{short_name(spec.module)}.py or what it imports"
        )
        words = {
            "source": f"{file} changed",
            "nvrtc": "NVRTC became another version",
            "triton": f"Triton {last.get('triton')} became {job.compiler}",
            "worker": "the compile worker changed",
            "format": "the cache's format changed",
        }
        return ", ".join(words[name] for name in changed)

    def put(self, job: Job, compiled: Compiled) -> None:
        """Store an entry; readers never see half of one."""
        meta: dict[str, Any] = {k: v for k, v in asdict(compiled).items() if k != "cubin"}
        meta["sha256"] = hashlib.sha256(compiled.cubin).hexdigest()
        key = job.key()
        write_aside(self.folder / f"{key}.cubin", compiled.cubin)
        write_aside(self.folder / f"{key}.json", dump(meta))
        write_aside(self.folder / "last" / f"{job.identity()}.json", dump(job.parts()))


def dump(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON."""
    return json.dumps(value, sort_keys=True).encode()
