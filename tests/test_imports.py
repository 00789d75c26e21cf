"""What commands and the runtime import: the thin side works, and starts fast, with torch absent."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "triton", "onnx", "onnxruntime", "tokenizers", "pydantic", "fastapi", "numpy", "rich")

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "triton", "onnx"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Block())
"""

IMPORT_ALL = """
import importlib, pkgutil
for top in %r:
    package = importlib.import_module(top)
    for module in pkgutil.walk_packages(getattr(package, "__path__", ()), top + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""

RUN_CLI = """
import sys
from llmopt.cli.main import run
code = run(%r)
print(sorted(set(%r) & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((sys.executable, "-c", code), capture_output=True, text=True)


@pytest.mark.parametrize("top", ["llmopt.runtime", "llmopt.serve", "llmopt.artifact", "llmopt.program"])
def test_the_run_side_imports_with_torch_blocked(top):
    done = python(BLOCK + IMPORT_ALL % [top])
    assert done.returncode == 0, done.stderr


def test_the_block_works():
    done = python(BLOCK + IMPORT_ALL % ["llmopt.ir"])
    assert "torch must not be imported here" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["serve", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    done = python(RUN_CLI % (arguments, HEAVY))
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", ["compile", "plan", "bench", "eval", "inspect", "make-checkpoint"])
def test_help_of_any_command_needs_no_torch(command):
    done = python(RUN_CLI % ([command, "--help"], ("torch", "transformers", "onnxruntime")))
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]], ids=" ".join)
def test_help_takes_at_most_half_a_second(arguments):
    command = (sys.executable, "-m", "llmopt.cli.main", *arguments)
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) <= 0.5, "of the processor: other tests share the cores"
