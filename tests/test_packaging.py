"""The wheel: one top-level package with everything inside, and what fresh environments can do with it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"

# One worker: the environments are made once, and take a minute each.
pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without network from a copy that holds the sources alone."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("llmopt", "passes", "targets", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".")
    subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    return next((copy / "dist").glob("*.whl"))


def test_the_wheel_holds_one_package_with_all_plugins(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"llmopt"}
    for kind, pattern in (("passes", "*.py"), ("targets", "**/*.py"), ("recipes", "*.yaml")):
        expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / kind).glob(pattern)}
        assert expected
        assert expected <= {n.removeprefix("llmopt/_builtin/") for n in names if n.startswith("llmopt/_builtin/")}
    page = {p.relative_to(ROOT).as_posix() for p in (ROOT / "llmopt/serve/page").iterdir() if p.is_file()}
    assert {Path(name).suffix for name in page} == {".css", ".html", ".js", ".py", ".svg"}
    assert page <= set(names)


def test_the_wheel_says_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    bare = {line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert not {line for line in bare if any(heavy in line for heavy in ("torch", "transformers", "onnx"))}
    scripts = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "llmopt = llmopt.cli.main:main" in scripts


class Environment:
    """A fresh virtual environment with the wheel and some extras; nothing of this checkout is importable in it."""

    def __init__(self, folder: Path, wheel: Path, extras: str) -> None:
        subprocess.run((sys.executable, "-m", "venv", str(folder)), check=True)
        self.bin, self.cwd = folder / "bin", folder
        # A checkout on PYTHONPATH would hide what the wheel lacks.
        self.env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        install = ("-m", "pip", "install", "--quiet", "--no-compile", "-c", str(CONSTRAINTS), f"{wheel}[{extras}]")
        done = self.run("python", *install)
        assert done.returncode == 0, done.stderr[-2000:]

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = (str(self.bin / program), *arguments)
        return subprocess.run(command, cwd=self.cwd, env=self.env, capture_output=True, text=True)


@pytest.fixture(scope="session")
def compiled(wheel, tmp_path_factory) -> Path:
    """The embedded model, compiled by the installed wheel."""
    environment = Environment(tmp_path_factory.mktemp("compile") / "venv", wheel, "compile,onnxruntime")
    artifact = tmp_path_factory.mktemp("artifact") / "int4"
    checkpoint = ROOT / "models" / "classics-2m"
    done = environment.run("llmopt", "compile", str(checkpoint), "-r", "int4-cpu", "-o", str(artifact))
    assert done.returncode == 0, done.stderr
    return artifact


@pytest.fixture(scope="session")
def runtime(wheel, tmp_path_factory) -> Environment:
    """The bare runtime with the server: no torch, no transformers, no onnx."""
    return Environment(tmp_path_factory.mktemp("runtime") / "venv", wheel, "onnxruntime,serve")


@pytest.mark.slow
def test_an_installed_wheel_compiles_the_embedded_model(compiled):
    manifest = json.loads((compiled / "manifest.json").read_text())
    assert manifest["target"] == "onnxruntime"
    assert manifest["golden"]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch", "transformers", "triton", "onnx"])
def test_the_bare_runtime_has_no_compile_side(runtime, module):
    assert "ModuleNotFoundError" in runtime.run("python", "-c", f"import {module}").stderr


@pytest.mark.slow
def test_compiling_without_the_extra_is_one_line(runtime):
    done = runtime.run("llmopt", "compile", str(ROOT / "models" / "classics-2m"), "-r", "int4-cpu", "-o", "nothing")
    assert done.returncode == 10
    assert "llmopt[compile]" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (runtime.cwd / "nothing").exists()


@pytest.mark.slow
def test_the_bare_runtime_serves_the_artifact(runtime, compiled):
    with serving(runtime, compiled) as port:
        models = ask(port, "GET", "/v1/models")[1]
        body = {
            "model": models["data"][0]["id"],
            "prompt": "It was the best of times",
            "max_tokens": 8,
            "temperature": 0,
        }
        status, answer = ask(port, "POST", "/v1/completions", body)
        url = f"http://127.0.0.1:{port}"
        load = runtime.run("llmopt", "bench", "serve", url, "--requests", "3", "--prompt-len", "4", "--json")
        with urllib.request.urlopen(url) as page:
            assert b"Playground" in page.read()
    assert load.returncode == 0, load.stderr
    assert json.loads(load.stdout)["succeeded"] == 3
    assert status == 200, answer
    assert answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 8


@contextlib.contextmanager
def serving(runtime: Environment, artifact: Path):
    """``llmopt serve`` on a free port, ready to answer; the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = (str(runtime.bin / "llmopt"), "serve", str(artifact), "--host", "127.0.0.1", "--port", str(port))
    log = runtime.cwd / "serve.log"
    with log.open("w") as sink:
        server = subprocess.Popen(command, cwd=runtime.cwd, env=runtime.env, stdout=sink, stderr=sink)
        try:
            wait_until_healthy(port, server, log)
            yield port
        finally:
            server.terminate()
            server.wait(timeout=30)


def wait_until_healthy(port: int, server: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            if ask(port, "GET", "/health")[0] == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"not healthy after {seconds} s: {log.read_text()}")


def ask(port: int, method: str, path: str, body: dict[str, object] | None = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request; straight to the port, whatever proxy the environment names."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"{}")
    finally:
        connection.close()
