"""The house rules: import contracts, file length, docstrings, one test a pass, recipes that parse."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for top in ("llmopt", "passes", "targets", "benchmarks") for p in (ROOT / top).rglob("*.py"))
PASSES = sorted(p.stem for p in (ROOT / "passes").glob("*.py") if not p.stem.startswith("_"))
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
MAX_LINES = 400

pytestmark = pytest.mark.xdist_group("architecture")  # the broken copy is linted once


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def too_long(text: str) -> bool:
    return len(text.splitlines()) > MAX_LINES


def has_docstring(text: str) -> bool:
    return not text.strip() or bool(ast.get_docstring(ast.parse(text)))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_source_file_is_short_and_says_what_it_is(path):
    text = path.read_text("utf-8")
    assert not too_long(text)
    assert has_docstring(text)


def test_the_file_checks_can_fail():
    assert too_long("x = 1\n" * (MAX_LINES + 1))
    assert not has_docstring("import os\n")


@pytest.mark.parametrize("stem", PASSES)
def test_a_pass_is_named_after_its_file_and_has_its_test(stem):
    from llmopt.ir.pass_manager import Pass
    from llmopt.registry import load_pass

    cls = load_pass(stem)
    assert issubclass(cls, Pass)
    assert cls.name == stem
    assert (ROOT / "tests" / "passes" / f"test_{stem}.py").is_file()
    docstring = (cls.__doc__ or "").lower()
    assert "matches" in docstring
    assert "replaces" in docstring


@pytest.mark.parametrize("stem", RECIPES)
def test_a_recipe_parses(stem):
    from llmopt.recipe import load_recipe

    assert load_recipe(stem).passes


def test_passes_targets_and_recipes_are_found():
    from llmopt.registry import names

    assert names("passes") == PASSES != []
    assert names("recipes") == RECIPES != []
    assert {"reference", "onnxruntime"} <= set(names("targets"))


VIOLATIONS = {
    "llmopt/program.py": ("import torch", "the contracts of both sides need numpy at most"),
    "llmopt/serve/__init__.py": ("import llmopt.ir.module", "the runtime and the server know no compiler and no torch"),
    "llmopt/runtime/__init__.py": ("import llmopt.serve", "the server drives the runtime, never the other way"),
    "llmopt/loadgen/__init__.py": (
        "import llmopt.serve.wire",
        "the load generator knows no side of llmopt",
    ),
    "llmopt/ir/module.py": ("import llmopt.lower.fork", "compile side: ir below lower and frontend"),
    "llmopt/registry.py": ("import llmopt.cli.main", "nobody imports the command line"),
    "llmopt/recipe.py": ("import passes.eliminate_noops", "llmopt finds passes and targets through the registry only"),
    "passes/eliminate_noops.py": ("import llmopt.lower.lowering", "a pass sees the IR and nothing else"),
    "passes/prune_logits.py": ("import passes.fuse_qkv", "passes do not know each other"),
    "targets/reference/target.py": (
        "import llmopt.registry",
        "a target sees the IR, the program and the step protocol",
    ),
    "targets/onnxruntime/target.py": ("import targets.reference.target", "targets do not know each other"),
}


def lint_imports(folder: Path) -> str:
    """Output of the import linter, run in ``folder`` over the packages found there."""
    command = (sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The linter's verdict on a copy of the sources that breaks every contract once."""
    copy = tmp_path_factory.mktemp("broken")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for top in ("llmopt", "passes", "targets"):
        shutil.copytree(ROOT / top, copy / top, ignore=shutil.ignore_patterns("__pycache__"))
    for path, (line, _) in VIOLATIONS.items():
        with (copy / path).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    return lint_imports(copy)


def test_every_import_contract_holds():
    assert " 0 broken." in lint_imports(ROOT)


@pytest.mark.parametrize("contract", [contract for _, contract in VIOLATIONS.values()])
def test_every_import_contract_can_break(broken, contract):
    assert f"{contract} BROKEN" in broken


def test_every_contract_has_its_violation():
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    assert sorted(c["name"] for c in contracts) == sorted(contract for _, contract in VIOLATIONS.values())


def test_every_test_called_heavy_exists():
    from tests.conftest import HEAVY

    for file, names in HEAVY.items():
        (path,) = (ROOT / "tests").rglob(file)
        text = path.read_text("utf-8")
        assert [name for name in names if f"def {name}(" not in text] == []
