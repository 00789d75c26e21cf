"""llmopt serve over a compiled artifact: the same text as llmopt run; bad artifacts end it with their code."""

import json
import os
import shutil
import socket
import subprocess
import sys

import httpx
import pytest

from llmopt.cli.main import run
from tests.serve.conftest import running


@pytest.fixture(scope="module")
def artifact(compiled):
    """The embedded model for onnxruntime, context 128."""
    return compiled(128)


def command(artifact, *arguments):
    """``llmopt serve`` on a free port."""
    return [sys.executable, "-m", "llmopt.cli.main", "serve", str(artifact), "--port", "0", *arguments]


def failure(artifact, *arguments):
    """Exit code and standard error of a server that must not come up."""
    done = subprocess.run(command(artifact, *arguments), capture_output=True, text=True, timeout=30)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_it_says_what_run_says(artifact, root, capsys):
    run(["run", str(artifact), "-p", "Call me", "--max-tokens", "9", "--json"])
    expected = json.loads(capsys.readouterr().out)["text"]
    with running(command(artifact, "--served-model-name", "whale", "--max-sequences", "3"), root) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "whale"
        body = {"model": "whale", "prompt": "Call me", "max_tokens": 9, "temperature": 0, "n": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).json()
        assert [c["text"] for c in answer["choices"]] == [expected] * 4


def test_no_torch_in_either_process(artifact, root):
    """No library of torch is mapped into either process while they answer."""
    with running(command(artifact), root) as server:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=30)
        for pid in (server.process.pid, server.engine_pid()):
            with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
                text = maps.read()
            assert "libtorch" not in text
            assert "numpy" in text  # negative control: libraries do show there


def test_a_flipped_byte_is_an_artifact_error(artifact, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    with (broken / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    code, err = failure(broken)
    assert code == 9
    assert "is not what the manifest names" in err
    assert err.count("\n") == 1


def test_no_artifact(tmp_path):
    code, err = failure(tmp_path / "nothing")
    assert code == 9
    assert "no such artifact" in err


def test_a_port_in_use(artifact):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = failure(artifact, "--port", str(port))
    assert code == 10
    assert err == f"error: port {port} is in use on 127.0.0.1 (choose another --port)\n"


def test_without_fastapi_it_says_what_to_install(artifact, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert run(["serve", str(artifact)]) == 10
    assert "pip install 'llmopt[serve]'" in capsys.readouterr().err
