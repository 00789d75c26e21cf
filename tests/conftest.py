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


# Measured at over two seconds each, or many of a kind: together most of the suite's time. make test runs them.
HEAVY = {
    "test_bad_input.py": ("test_bad_recipe", "test_a_full_disk_leaves_nothing"),
    "test_conformance.py": ("test_a_wrong_attention_is_caught", "test_a_shifted_position_is_caught"),
    "test_make_checkpoint.py": ("test_transformers_and_our_frontend_find_every_tensor",),
    "test_ort_attention.py": ("test_matches_the_reference", "test_kernel_choice"),
    "test_ort_target.py": ("test_float16", "test_bytes_are_deterministic_and_hold_no_weights"),
    "test_plan.py": ("test_the_plan_is_what_the_build_weighs", "test_command", "test_too_little_memory"),
    "test_processes.py": ("test_a_signal_drains",),
    "test_ragged.py": ("test_wrong_metadata_shows", "test_equals_plain_attention"),
    "test_sampler.py": ("test_draws_follow_the_distribution", "test_every_draw_equals_the_oracle"),
    "test_session.py": ("test_greedy_tokens_equal_transformers",),
    "test_text.py": ("test_same_in_every_process",),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the heavy tests and the other architectures of a sweep slow."""
    for item in items:
        name = getattr(item, "originalname", item.name)
        if name in HEAVY.get(item.path.name, ()) or _is_repetition(item):
            item.add_marker(pytest.mark.slow)


def _is_repetition(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    architecture = params.get("architecture", params.get("case"))
    return item.path.name in SWEEPS and architecture is not None and architecture not in REPRESENTATIVES
