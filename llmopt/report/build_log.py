"""The build log: what a compile leaves beside its artifact because it differs from run to run (times, paths)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def build_log(artifact: Path) -> dict[str, Any] | None:
    """``<artifact>.build.json`` beside the artifact: seconds, passes, checkpoint; None when missing or not JSON."""
    resolved = artifact.resolve()
    try:
        log: dict[str, Any] = json.loads(resolved.with_name(resolved.name + ".build.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return log
