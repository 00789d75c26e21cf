"""Reads and writes tuning tables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.errors import ConfigError

from . import Table


@dataclass(frozen=True)
class Loaded:
    """Entries for a build, and the compiler they were measured with (None: nothing was measured)."""

    table: Table
    compiler: str | None

    def note(self, wanted: str) -> str:
        """One line for the manifest."""
        if self.compiler is None:
            return "none: nothing was measured on this architecture"
        return self.compiler if self.compiler == wanted else f"{self.compiler} (nothing was measured with {wanted})"


def builtin(arch: int) -> Path:
    """Where this repository keeps the table of an architecture."""
    return Path(__file__).parent / f"sm_{arch}.json"


def load_table(arch: int, compiler: str, path: Path | None = None) -> Loaded:
    """Entries for a build with a compiler ("triton 3.9.0").

    Of the built-in table, those of the nearest version when this one was never measured. Of a table somebody named
    (``path``) only this compiler's: raises ConfigError when it has none, is damaged, or is of another architecture.
    """
    if path is None:
        compilers = read(builtin(arch), arch) if builtin(arch).exists() else {}
        if not compilers:
            return Loaded({}, None)
        near = min(compilers, key=lambda known: (known != compiler, distance(known, compiler), known))
        return Loaded(compilers[near], near)
    compilers = read(path, arch)
    if compiler not in compilers:
        known = ", ".join(sorted(compilers)) or "nothing"
        hint = f"measure with llmopt tune, or install one of: {known}"
        raise ConfigError(f"the table has no entries of {compiler}", where=str(path), hint=hint)
    return Loaded(compilers[compiler], compiler)


def distance(known: str, wanted: str) -> list[int]:
    """How far apart two versions are, the major part first."""
    a, b = ([int(part) for part in re.findall(r"\d+", text)] for text in (known, wanted))
    return [abs(x - y) for x, y in zip(a, b)]


def read(path: Path, arch: int) -> dict[str, Table]:
    """Entries by compiler. Raises ConfigError for a file that is no table of this architecture."""
    try:
        raw = json.loads(path.read_text("utf-8"))
        found, compilers = raw["arch"], raw["compilers"]
        for kernels in compilers.values():
            for entries in kernels.values():
                for key, config in entries.items():
                    float(config.get("us", 0))
                    if not isinstance(key, str):
                        raise TypeError(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "llmopt tune writes such tables"
        raise ConfigError(f"not a tuning table: {type(error).__name__} {error}", where=str(path), hint=hint) from error
    if found != arch:
        raise ConfigError(f"the table is of sm_{found}, not of sm_{arch}", where=str(path), hint="name another file")
    return dict(compilers)


def write(path: Path, arch: int, compiler: str, kernels: Mapping[str, Mapping[str, Any]]) -> int:
    """Add entries to a table, in place of those of the same keys; returns how many it then has of this compiler.

    A new table starts from the built-in one's entries of this compiler when ``path`` does not exist.
    """
    source = path if path.exists() else builtin(arch)
    compilers = read(source, arch) if source.exists() else {}
    merged = {kernel: dict(entries) for kernel, entries in compilers.get(compiler, {}).items()}
    for kernel, entries in kernels.items():
        merged.setdefault(kernel, {}).update(entries)
    text = json.dumps({"arch": arch, "compilers": {**compilers, compiler: merged}}, indent=1, sort_keys=True) + "\n"
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text, "utf-8")
    aside.replace(path)
    return sum(map(len, merged.values()))
