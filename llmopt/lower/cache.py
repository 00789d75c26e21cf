"""Where targets keep what they compiled, from one build to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LLMOPT_CACHE, else llmopt under $XDG_CACHE_HOME, else ~/.cache/llmopt."""
    if found := os.environ.get("LLMOPT_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmopt"


def write_aside(path: Path, data: bytes) -> None:
    """Write a file aside, then rename it: readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_bytes(data)
    aside.replace(path)
