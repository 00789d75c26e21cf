"""The kernel suite on the GPU: every launch it makes in Triton's interpreter leaves the same memory there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.targets.cuda.gpu import replay
from tests.targets.cuda.gpu.cases import FAST_ERROR

pytestmark = pytest.mark.gpu
SANITIZER = shutil.which("compute-sanitizer")


@pytest.fixture(scope="module")
def suite(artifacts: Path) -> Path:
    if not (artifacts / "suite" / "launches.json").is_file():
        pytest.skip("the kernel suite was not recorded (see recorder.py)")
    return artifacts / "suite"


def test_every_launch_leaves_what_the_interpreter_leaves(suite: Path) -> None:
    assert replay.replay(suite) == []


@pytest.mark.parametrize("kernel", ["tiled", "walked"])
def test_fast_accumulation_costs_what_is_said(kernel: str, suite: Path) -> None:
    """The control is the accurate sum of the same operands: it errs by float16's rounding only."""
    replayer, found = replay.Replay(suite), {}
    for number, entry in enumerate(json.loads((suite / "launches.json").read_text())):
        if entry["test"].startswith("test_many_columns") and kernel in entry["test"]:
            buffers = replayer.left(number, entry)
            found[entry["test"]] = replay.rms_error(*buffers["out0"], entry["types"]["out0"])
    print(found)
    accurate = found[f"test_many_columns[{kernel}-128]"]
    fast = found[f"test_many_columns[{kernel}-0]"]
    assert accurate <= 2.0**-10
    assert accurate < fast <= accurate + FAST_ERROR


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str, suite: Path) -> None:
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", sys.executable, replay.__file__, str(suite)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode != 9, done.stdout[-3000:]
    assert "0 errors" in done.stdout or "0 hazards" in done.stdout


def test_a_difference_is_seen() -> None:
    x = np.array([1.0, 2.0, np.nan], np.float32)
    near, far = x * np.float32(1 + 2**-14), x * np.float32(1.01)
    assert not replay.difference(near.view(np.uint8), x.view(np.uint8), "float32")
    assert replay.difference(far.view(np.uint8), x.view(np.uint8), "float32")
    assert replay.difference(np.nan_to_num(x).view(np.uint8), x.view(np.uint8), "float32")
    assert replay.difference(np.array([1], np.int32).view(np.uint8), np.array([2], np.int32).view(np.uint8), "int32")
