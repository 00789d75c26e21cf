"""The token windows of a build: from the recipe's or the command line's text, else written by the model itself."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

import llmopt
from llmopt.calibration.spool import Spool
from llmopt.calibration.text import Windows, read_windows
from llmopt.errors import ConfigError, LlmoptError
from llmopt.frontend import Checkpoint
from llmopt.recipe import CalibrationOptions, Recipe
from llmopt.self_text import write_windows


@dataclass(frozen=True)
class Samples:
    """A build's windows, the folder that makes its calibration resumable, and the digest of what it depends on."""

    windows: Windows
    folder: Path
    key: str


def draw_samples(
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: CalibrationOptions,
    folder: Path,
    max_context: int,
    progress: Callable[[str, int, int], None],
    device: torch.device,
) -> Samples | None:
    """The windows when a text is given or a pass calibrates, else None. What an equal build left in ``folder`` is kept.

    ``device``: where the model writes, and whose arithmetic what is calibrated on them depends on.
    Raises ConfigError without a tokenizer, RequestError for a text that is too short, ResourceError for a model too
    large to write its own.
    """
    if options.text is None and not any(pass_.needs_calibration for pass_ in recipe.passes):
        return None
    text = Path(options.text) if options.text is not None else None
    state = f"{llmopt.__version__} {checkpoint.digest} {recipe.text} {options} {max_context} {device.type}"
    state += file_state(text) if text is not None else ""
    key = hashlib.sha256(state.encode()).hexdigest()
    length = min(options.window, max_context)

    def draw() -> dict[str, Tensor]:
        if text is None:
            found = write_windows(checkpoint, options.tokens, length, options.seed, progress, device)
        else:
            found = read_windows(text, tokenizer_of(checkpoint), options.tokens, length, options.seed)
        return {"calibration": found.calibration, "held_out": found.held_out}

    try:
        kept = Spool(folder, key).saved("windows", draw).tensors()
    except LlmoptError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Samples(Windows(kept["calibration"], kept["held_out"]), folder, key)


def file_state(text: Path) -> str:
    """What tells one version of a text from another; the text itself is checked when it is read."""
    try:
        found = text.stat()
    except OSError:
        return ""
    return f" {text.resolve()} {found.st_size} {found.st_mtime_ns}"


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer. Raises ConfigError when it has no tokenizer.json."""
    file = checkpoint.tokenizer_files.get("tokenizer.json")
    if file is None:
        raise ConfigError("no tokenizer.json to read calibration text with", where=str(checkpoint.path))
    return Tokenizer.from_file(str(file))
