"""The command line on a GPU: no torch, no Triton, no child process; devices, memory and faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt.artifact.digest import sha256
from llmopt.artifact.manifest import FileEntry, Manifest
from llmopt.cli.main import run
from llmopt.launch import LaunchPlan, Pointer
from llmopt.runtime.executors.cuda.driver import call, open_device
from tests.targets.cuda.guard import GUARD, RUN

pytestmark = pytest.mark.gpu
MODEL = "classics-2m"
RESOURCE, EXECUTOR = 10, 12


def command(artifact: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """llmopt run in a process that can neither import a compiler nor start one."""
    line = [sys.executable, "-c", GUARD + RUN, "run", str(artifact), "--prompt", "The old house", "--max-tokens", "8"]
    options = more if "--device" in more else ("--device", "cuda", *more)
    return subprocess.run([*line, *options], capture_output=True, text=True, env={**os.environ, **environment})


def test_a_run_without_torch_triton_or_nvcc(artifacts: Path) -> None:
    done = command(artifacts / MODEL, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) == 8


def test_hidden_and_missing_devices(artifacts: Path) -> None:
    hidden = command(artifacts / MODEL, CUDA_VISIBLE_DEVICES="")
    assert (hidden.returncode, hidden.stderr.count("\n")) == (RESOURCE, 1)
    assert "CUDA_VISIBLE_DEVICES" in hidden.stderr
    missing = command(artifacts / MODEL, "--device", "cuda:99")
    assert missing.returncode == RESOURCE
    assert "no GPU 99" in missing.stderr


@pytest.fixture
def crowded() -> Iterator[None]:
    """A GPU with 300 MB left."""
    device = open_device("cuda")
    held = call("cuMemAlloc", device.free_bytes()[0] - (300 << 20))
    yield
    call("cuMemFree", held)
    device.close()


def test_a_plan_larger_than_the_free_memory(artifacts: Path, crowded: None, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, whose context exists: another would find no room for one."""
    assert run(["run", str(artifacts / MODEL), "--device", "cuda", "--prompt", "The", "--max-tokens", "2"]) == RESOURCE
    printed = capsys.readouterr().err
    assert re.search(r"but 0\.\d+ GB are free: 0\.\d+ GB short", printed)
    assert printed.count("\n") == 1


def test_no_room_for_a_context(artifacts: Path, crowded: None) -> None:
    done = command(artifacts / MODEL)
    assert done.returncode == RESOURCE
    assert "the GPU is out of memory" in done.stderr
    assert done.stderr.count("\n") == 1


def spoiled(artifact: Path, folder: Path) -> Path:
    """A copy whose first launch of every bucket points far past its memory."""
    copy = shutil.copytree(artifact, folder / "spoiled")
    manifest = Manifest.from_json((copy / "manifest.json").read_text())
    files = dict(manifest.files)
    for name in [name for name in files if name.startswith("launch/")]:
        plan = LaunchPlan.from_json((copy / name).read_text())
        buckets = []
        for bucket in plan.buckets:
            first, *others = bucket.launches
            far = tuple(Pointer(a.name, a.offset + (1 << 44)) if isinstance(a, Pointer) else a for a in first.args)
            buckets.append(replace(bucket, launches=(replace(first, args=far), *others)))
        text = replace(plan, buckets=tuple(buckets)).to_json().encode()
        (copy / name).write_bytes(text)
        files[name] = FileEntry(len(text), sha256(text))
    (copy / "manifest.json").write_text(replace(manifest, files=files).to_json())
    return copy


def test_an_illegal_address_kills_the_engine_and_says_so(artifacts: Path, tmp_path: Path) -> None:
    done = command(spoiled(artifacts / MODEL, tmp_path))
    assert done.returncode == EXECUTOR
    assert "not its own" in done.stderr
    assert "the engine is dead" in done.stderr
    assert done.stderr.count("\n") == 1
