"""The embedded model compiled once for each executor."""

from __future__ import annotations

import pytest

from llmopt.cli.main import run


@pytest.fixture(scope="session")
def compiled(embedded_model, tmp_path_factory):
    """``compiled(recipe)`` → the artifact of the embedded model, context 256."""
    built = {}

    def get(recipe):
        if recipe not in built:
            built[recipe] = tmp_path_factory.mktemp("artifacts") / recipe
            arguments = ["compile", str(embedded_model), "-r", recipe, "-o", str(built[recipe]), "--max-context", "256"]
            assert run([*arguments, "--json"]) == 0
        return built[recipe]

    return get
