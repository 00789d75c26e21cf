"""Artifacts of the cuda target whose cubins are empty: for tests that need its files and no kernel that runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifact import WeightsPlan
from llmopt.compiler import CompileOptions, compile_checkpoint
from llmopt.recipe import load_recipe, parse_recipe
from targets.cuda import build
from targets.cuda.cache import Compiled, Job

SMALL = "{archs: [80, 90], decode_buckets: [1, 2], extend_buckets: [16], extend_sequences: [1]}"


def no_compiler(jobs: Iterable[Job], *_: Any) -> dict[Job, Compiled]:
    """An empty cubin for each job, with the tensor maps its signature asks for."""
    found = {}
    for job in jobs:
        types = [kind for _, kind in job.specialization.signature if kind.startswith("tensordesc")]
        boxes = [re.findall(r"\d+", kind.partition("[")[2].partition("]")[0]) for kind in types]
        maps = tuple((tuple(map(int, box)), 0) for box in boxes)
        found[job] = Compiled(b"no code", job.specialization.function, 32, 0, 32, 0, maps)
    return found


def compile_without_compiler(
    checkpoint: Path, folder: Path, weights: WeightsPlan, text: str | None = None, max_context: int = 64
) -> Path:
    """The artifact of bf16-cuda, or another recipe's ``text``, with small buckets, for sm_80 and sm_90."""
    text = (text or load_recipe("bf16-cuda").text).replace("target_options: {}", f"target_options: {SMALL}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_all", no_compiler)
        compile_checkpoint(
            checkpoint, parse_recipe(text), folder, CompileOptions(max_context=max_context, weights=weights)
        )
    return folder
