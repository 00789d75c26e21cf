"""Artifacts for the GPU tests: LLMOPT_GPU_ARTIFACTS names a folder of prebuilt ones, else they are built here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder; see artifacts.py."""
    if found := os.environ.get("LLMOPT_GPU_ARTIFACTS"):
        return Path(found)
    from tests.targets.cuda.gpu.artifacts import main

    folder = tmp_path_factory.mktemp("gpu")
    main(folder, [])
    return folder


@pytest.fixture(scope="session", autouse=True)
def context() -> Iterator[None]:
    """Keeps the GPU's context from one test to the next: making one takes a quarter of a second."""
    from llmopt.runtime.executors.cuda.driver import open_device

    device = open_device("cuda")
    yield
    device.close()
