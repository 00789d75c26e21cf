"""Shared fixtures: the embedded model, the optional directory of larger models, one thread a worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Workers share the cores; torch and onnxruntime would each take all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels run in Triton's interpreter here; its decorators look when a kernel's file is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

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


def pytest_sessionfinish() -> None:
    """Remove the checkpoints that tests shared; a worker of xdist ends without its exit handlers."""
    if shared_checkpoints := sys.modules.get("tests.captured"):
        shared_checkpoints.remove()


# Tests in these files run once an architecture: make check takes the plainest, make test all of them.
SWEEPS = ("test_conformance.py", "test_capture.py")
REPRESENTATIVES = {"llama"}

# Whole files that compile models or start servers: together most of the suite's time. make test runs them.
HEAVY_FILES = {
    "test_bad_input.py", "test_calibration_device.py", "test_cli_reports.py", "test_cuda_plan.py",
    "test_make_checkpoint.py", "test_plan.py", "test_processes.py", "test_ragged.py", "test_run.py", "test_serve.py",
    "test_session.py",
}  # fmt: skip

# Measured at over two seconds each, or many of a kind, in files that are light otherwise.
HEAVY = {
    "test_conformance.py": ("test_a_wrong_attention_is_caught", "test_a_shifted_position_is_caught"),
    "test_ort_attention.py": ("test_matches_the_reference", "test_kernel_choice", "test_every_option_counts"),
    "test_ort_target.py": (
        "test_float16", "test_bytes_are_deterministic_and_hold_no_weights", "test_weights_stream_in_chunks",
    ),
    "test_sampler.py": ("test_draws_follow_the_distribution", "test_every_draw_equals_the_oracle"),
    "test_text.py": ("test_same_in_every_process",),
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the heavy tests and the other architectures of a sweep slow."""
    for item in items:
        name = getattr(item, "originalname", item.name)
        heavy = item.path.name in HEAVY_FILES or name in HEAVY.get(item.path.name, ())
        if heavy or _is_repetition(item):
            item.add_marker(pytest.mark.slow)


def _is_repetition(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    architecture = params.get("architecture", params.get("case"))
    return item.path.name in SWEEPS and architecture is not None and architecture not in REPRESENTATIVES
