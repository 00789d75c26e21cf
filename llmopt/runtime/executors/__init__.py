"""Executors by target name: one module of this package each, imported only when an artifact asks for it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llmopt.errors import ResourceError, TargetError
from llmopt.target import LoadOptions

if TYPE_CHECKING:
    from llmopt.artifact import Artifact
    from llmopt.runtime.protocol import Executor


def load_executor(artifact: Artifact, options: LoadOptions) -> Executor:
    """The executor of an artifact's target, loaded and ready.

    A target without a module here brings its own (targets/<name>/executor.py). Digests that were deferred are checked
    first, unless the module says CHECKS_WEIGHTS: then it does so while it reads. Raises TargetError for an unknown
    target, ResourceError when the target's library is not installed, and whatever the executor finds wrong.
    """
    name = artifact.manifest.target
    module_name = f"{__name__}.{name}"
    here = name.isidentifier() and find_spec(module_name) is not None
    try:
        if here:
            module = import_module(module_name)
        else:
            from llmopt.registry import load_executor_module

            module = load_executor_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("llmopt", "targets")):
            raise
        hint = f"pip install 'llmopt[{name if here else 'compile'}]'"
        raise ResourceError(f"target {name} needs {error.name}, which is not installed", hint=hint) from error
    if not hasattr(module, "load"):
        raise TargetError(f"unknown target {name!r}", where="manifest.json")
    if not getattr(module, "CHECKS_WEIGHTS", False):
        artifact = artifact.checked()
    executor: Executor = module.load(artifact, options)
    return executor
