"""Servers as processes: started on a free port, stopped at the end of the test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import pytest

from llmopt.cli.main import run
from llmopt.runtime.tokenizer import Tokenizer

CLIENT = httpx.Client(timeout=20)
"""Made once: a client of its own takes a request as long as everything else, and a dead server answers for 2 s."""


@dataclass
class Running:
    """A server process and its address."""

    process: subprocess.Popen
    url: str

    def engine_pid(self) -> int:
        """Process id of its engine process."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        [pid] = path.read_text().split()
        return int(pid)

    def wait(self, seconds: float = 15.0) -> tuple[int, str]:
        """Exit code and standard error of the process."""
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


def until(condition, seconds=30.0):
    """Wait for a condition, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process disappears (or is a zombie nobody waits for) in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@contextlib.contextmanager
def running(command, root):
    """Start a server and yield it once it has printed its address."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=environment
    )
    try:
        line = process.stdout.readline()
        yield Running(process, line.split()[-1] if line else "")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()


def fake_server(model, engine=None, **server):
    """Command line of a server over a fake engine."""
    arguments = [str(model), json.dumps(server), json.dumps(engine or {})]
    return [sys.executable, "-m", "tests.serve.fake_server", *arguments]


@pytest.fixture
def start(root, embedded_model):
    """``start(engine options, **server options)`` → a running server over a fake engine."""
    with contextlib.ExitStack() as stack:

        def go(engine=None, **server):
            return stack.enter_context(running(fake_server(embedded_model, engine, **server), root))

        yield go


@pytest.fixture(scope="module")
def server(root, embedded_model):
    """One server for the tests that leave it as it was."""
    with running(fake_server(embedded_model), root) as found:
        yield found


@pytest.fixture(scope="module")
def api(server):
    """An HTTP client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="session")
def compiled(embedded_model, tmp_path_factory):
    """``compiled(context)`` → the embedded model for onnxruntime in fp32; built once for all, and left as it is."""

    @cache
    def build(context):
        path = tmp_path_factory.mktemp("artifact") / f"fp32-{context}"
        found = ["compile", str(embedded_model), "-r", "fp32-cpu", "-o", str(path), "--max-context", str(context)]
        assert run([*found, "--json"]) == 0
        return path

    return build


@pytest.fixture(scope="session")
def tokenizer(embedded_model):
    """The tokenizer every fake server uses."""
    return Tokenizer.load(embedded_model / "tokenizer.json", embedded_model / "tokenizer_config.json")
