"""Random checkpoints of the tiny architectures and their captured graphs, made once a process."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from llmopt.frontend import capture, load_checkpoint
from llmopt.ir.module import Module
from llmopt.ir.rewrite import copy_module
from tests.architectures import make_checkpoint


@cache
def folder() -> Path:
    """Where the checkpoints lie."""
    return Path(mkdtemp(prefix="llmopt-checkpoints-"))


def remove() -> None:
    """Remove the checkpoints, at the end of a session."""
    shutil.rmtree(folder())
    folder.cache_clear()


@cache
def checkpoint(architecture: str) -> Path:
    """The checkpoint of an architecture, fp32, to be read alone."""
    return make_checkpoint(architecture, folder() / architecture)


@cache
def capture_once(path: Path, dtype: torch.dtype, context: int) -> Module:
    """The captured graph, never to be rewritten."""
    return capture(load_checkpoint(path), dtype, context).module


def captured(path: Path, dtype: torch.dtype, context: int) -> Module:
    """A copy of a checkpoint's captured graph."""
    return copy_module(capture_once(path, dtype, context))
