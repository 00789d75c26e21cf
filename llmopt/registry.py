"""Finds passes, targets and recipes by name, in the wheel (``llmopt._builtin``) or in the checkout."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import llmopt
from llmopt.errors import ConfigError, LlmoptError, TargetError

if TYPE_CHECKING:
    from llmopt.ir.pass_manager import Pass
    from llmopt.target import Target

KINDS = ("passes", "targets", "recipes")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


def names(kind: str) -> list[str]:
    """Sorted names of what exists of a kind: ``passes``, ``targets`` or ``recipes``."""
    found: set[str] = set()
    for folder in _folders(kind):
        if kind == "targets":
            found |= {p.parent.name for p in folder.glob("*/target.py")}
        else:
            found |= {p.stem for p in folder.glob("*.yaml" if kind == "recipes" else "*.py")}
    return sorted(n for n in found if not n.startswith("_"))


def load_pass(name: str) -> type[Pass]:
    """The class a pass file exposes as ``PASS``. Raises ConfigError for an unknown name."""
    if name not in names("passes"):
        raise ConfigError(f"unknown pass {name!r}", hint=did_you_mean(name, names("passes")))
    return _plugin(f"passes.{name}").PASS  # type: ignore[no-any-return]


def load_target(name: str) -> Target:
    """The object a target's target.py exposes as ``TARGET``. Raises TargetError for an unknown name."""
    _require_target(name)
    return _plugin(f"targets.{name}.target").TARGET  # type: ignore[no-any-return]


def load_executor_module(name: str) -> ModuleType:
    """targets/<name>/executor.py, of a target whose executor needs the compile side (reference)."""
    _require_target(name)
    try:
        return _plugin(f"targets.{name}.executor")
    except ModuleNotFoundError as error:
        raise TargetError(f"target {name} has no executor of its own", hint=str(error)) from error


def load_tuner(name: str) -> ModuleType:
    """targets/<name>/tune.py, of a target whose kernels have configurations to measure. Raises TargetError."""
    _require_target(name)
    try:
        return _plugin(f"targets.{name}.tune")
    except ModuleNotFoundError as error:
        if not str(error.name).endswith(f"{name}.tune"):
            raise
        raise TargetError(f"target {name} has nothing to tune") from error


def recipe_path(name: str) -> Path:
    """The file of a built-in recipe. Raises ConfigError for an unknown name."""
    for folder in _folders("recipes"):
        if name in names("recipes") and (path := folder / f"{name}.yaml").is_file():
            return path
    raise ConfigError(f"unknown recipe {name!r}", hint=did_you_mean(name, names("recipes")))


def _folders(kind: str) -> list[Path]:
    if kind not in KINDS:
        raise LlmoptError(f"unknown kind {kind!r}", hint=did_you_mean(kind, KINDS))
    package = Path(llmopt.__file__).parent
    return [p for p in (package / "_builtin" / kind, package.parent / kind) if p.is_dir()]


def _require_target(name: str) -> None:
    if name not in names("targets"):
        raise TargetError(f"unknown target {name!r}", hint=did_you_mean(name, names("targets")))


def _plugin(dotted: str) -> ModuleType:
    in_wheel = Path(llmopt.__file__).parent / "_builtin" / dotted.partition(".")[0]
    return importlib.import_module(f"llmopt._builtin.{dotted}" if in_wheel.is_dir() else dotted)
