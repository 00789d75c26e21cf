"""Shared fixtures: the embedded model, the optional directory of larger models, one thread a worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Workers share the cores; torch and onnxruntime would each take all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The checkpoint inside the repository (Llama, 3 layers, trained)."""
    return ROOT / "models" / "classics-2m"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Larger reference models and text (LLMOPT_SHARED or ../shared); tests that want them skip without."""
    path = Path(os.environ.get("LLMOPT_SHARED", ROOT.parent / "shared"))
    if not (path / "models").is_dir():
        pytest.skip("the shared reference models are not on this machine (set LLMOPT_SHARED)")
    return path


# Tests in these files run once an architecture: make check takes the representatives (plain; windows, softcaps and
# post-norms; layer norm, Conv1D and learned positions), make test all of them.
SWEEPS = ("test_conformance.py", "test_capture.py")
REPRESENTATIVES = {"llama", "gemma2", "gpt2"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark a sweep's other architectures slow."""
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
        if item.path.name in SWEEPS and params:
            architecture = params.get("architecture", params.get("case"))
            if architecture is not None and architecture not in REPRESENTATIVES:
                item.add_marker(pytest.mark.slow)
