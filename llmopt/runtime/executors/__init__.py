"""Executors by target name; each is imported only when an artifact asks for it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from llmopt.errors import ResourceError
from llmopt.target import LoadOptions

if TYPE_CHECKING:
    from llmopt.artifact import Artifact
    from llmopt.runtime.protocol import Executor

MODULES = {"onnxruntime": "llmopt.runtime.executors.onnxruntime"}


def load_executor(artifact: Artifact, options: LoadOptions) -> Executor:
    """The executor of an artifact's target, loaded and ready.

    A target without an executor here brings its own (targets/<name>/executor.py). Raises TargetError for an unknown
    target, ResourceError when the target's library is not installed, and whatever the executor finds wrong.
    """
    name = artifact.manifest.target
    try:
        if name in MODULES:
            module = import_module(MODULES[name])
        else:
            from llmopt.registry import load_executor_module

            module = load_executor_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("llmopt", "targets")):
            raise
        hint = f"pip install 'llmopt[{name if name in MODULES else 'compile'}]'"
        raise ResourceError(f"target {name} needs {error.name}, which is not installed", hint=hint) from error
    executor: Executor = module.load(artifact, options)
    return executor
