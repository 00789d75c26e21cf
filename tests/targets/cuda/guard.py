"""The head of a script in which importing a compiler, or starting one, is an error."""

GUARD = """
import importlib.abc, os, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "transformers", "onnx", "targets", "passes"):
            raise AssertionError(f"{name} must not be imported at run time")
sys.meta_path.insert(0, Block())
def audit(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        if not str(args[0]).endswith("ldconfig"):  # cuda-pathfinder asks it where libraries are
            raise AssertionError(f"nothing may be started at run time: {args[0]}")
sys.addaudithook(audit)
"""

RUN = """
from llmopt.cli.main import run
sys.exit(run(sys.argv[1:]))
"""
