"""What goes wrong on a machine, through the command line: one clear line, a documented exit code, no traceback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cuda.bindings import driver as real

from benchmarks import startup
from llmopt.artifact import Artifact, WeightsPlan
from llmopt.cli.main import run
from llmopt.report import accelerator
from llmopt.runtime.executors import cuda
from llmopt.runtime.executors.cuda import driver
from tests.targets.cuda.fake_builds import compile_without_compiler
from tests.targets.cuda.fake_driver import FakeDriver
from tests.targets.cuda.guard import GUARD, RUN

pytestmark = pytest.mark.slow  # compiling two artifacts takes some ten seconds
RESOURCE, EXECUTOR, ARTIFACT, CONFIG = 10, 12, 9, 3
ERROR = real.CUresult


@pytest.fixture(scope="module")
def artifact(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights: no golden tokens, which kernels that do nothing would miss."""
    return compile_without_compiler(embedded_model, tmp_path_factory.mktemp("cuda") / "a", WeightsPlan("random"))


def generate(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeDriver, *more: str, device: str = "cuda"
) -> int:
    """Exit code of llmopt run on a fake driver."""
    monkeypatch.setattr(driver, "cu", fake)
    return run(["run", str(artifact), "--device", device, "--prompt", "The old house", "--max-tokens", "4", *more])


def test_the_fake_driver_runs_a_model(artifact: Path, monkeypatch: Any, capsys: Any) -> None:
    fake = FakeDriver()
    assert generate(artifact, monkeypatch, fake, "--json") == 0
    assert '"tokens": [0, 0, 0, 0]' in capsys.readouterr().out
    assert "cuLaunchKernelEx" in fake.calls
    assert "cuGraphLaunch" in fake.calls
    assert not fake.memory, "everything allocated was freed"


H200 = ("NVIDIA H200", 90)
MACHINES: dict[str, tuple[FakeDriver, int, str]] = {
    "no driver": (
        FakeDriver(faults={"cuInit": (0, RuntimeError("libcuda.so.1 was not found"))}),
        RESOURCE,
        r"no NVIDIA driver on this machine",
    ),
    "no gpu": (FakeDriver(faults={"cuInit": (0, ERROR.CUDA_ERROR_NO_DEVICE)}), RESOURCE, r"no usable GPU.*nvidia-smi"),
    "driver too old": (FakeDriver(version=11080), RESOURCE, r"driver supports CUDA 11\.8, .* need CUDA \d+\.0"),
    "arch not in the artifact": (
        FakeDriver(devices=(("NVIDIA B200", 100),)),
        RESOURCE,
        r"this GPU is sm_100, the artifact holds kernels for sm_80, sm_90 .*archs: \[100\]",
    ),
    "too little memory": (
        FakeDriver(free=500 << 20),
        RESOURCE,
        r"plan needs [\d.]+ GB .* but 0\.52 GB are free: [\d.]+ GB short \(lower --max-context",
    ),
    "taken by another process": (
        FakeDriver(faults={"cuMemAlloc": (1, ERROR.CUDA_ERROR_OUT_OF_MEMORY)}),
        RESOURCE,
        r"the GPU is out of memory.*nvidia-smi",
    ),
    "illegal address": (
        FakeDriver(faults={"cuEventSynchronize": (2, ERROR.CUDA_ERROR_ILLEGAL_ADDRESS)}),
        EXECUTOR,
        r"a kernel touched memory that is not its own .*ILLEGAL_ADDRESS.*the engine is dead .*restart",
    ),
    "ecc error": (
        FakeDriver(faults={"cuGraphLaunch": (1, ERROR.CUDA_ERROR_ECC_UNCORRECTABLE)}),
        EXECUTOR,
        r"memory has an uncorrectable error .*the engine is dead",
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_broken_machine_is_one_line_and_a_code(machine: str, artifact: Path, monkeypatch: Any, capsys: Any) -> None:
    template, code, words = MACHINES[machine]
    fake = FakeDriver(template.devices, template.version, template.free, template.faults)
    assert generate(artifact, monkeypatch, fake) == code
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\n", printed)
    assert re.search(words, printed)
    if code == RESOURCE:
        assert "cuMemcpyHtoDAsync" not in fake.calls, "it failed before loading"


def test_the_shortage_is_what_is_missing(artifact: Path, monkeypatch: Any, capsys: Any) -> None:
    def shortage(free: int) -> float:
        assert generate(artifact, monkeypatch, FakeDriver(free=free)) == RESOURCE
        found = re.search(r"([\d.]+) GB short", capsys.readouterr().err)
        assert found
        return float(found[1])

    assert shortage(100 << 20) - shortage(400 << 20) == pytest.approx(300 * 2**20 / 1e9, abs=0.02)


def test_another_arch_of_the_generation_runs(artifact: Path, monkeypatch: Any) -> None:
    assert generate(artifact, monkeypatch, FakeDriver(devices=(("NVIDIA A10", 86),))) == 0


TWO = (H200, ("NVIDIA A100", 80))


@pytest.mark.parametrize(
    ("visible", "device", "code", "words"),
    [
        (None, "cuda:1", 0, "NVIDIA A100"),
        (None, "cuda", 0, "NVIDIA H200"),
        ("1", "cuda", 0, "NVIDIA A100"),
        ("1", "cuda:1", RESOURCE, "no GPU 1: 1 visible"),
        ("", "cuda", RESOURCE, "no GPU 0: 0 visible"),
        (None, "cpu", CONFIG, "does not run on device 'cpu'"),
        (None, "cuda:x", CONFIG, "does not run on device 'cuda:x'"),
    ],
)
def test_device_and_visible_devices_are_respected(
    visible: str | None, device: str, code: int, words: str, artifact: Path, monkeypatch: Any, capsys: Any, caplog: Any
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    caplog.set_level("INFO", "llmopt.cuda")
    assert generate(artifact, monkeypatch, FakeDriver(TWO), device=device) == code
    assert words in caplog.text + capsys.readouterr().err


def test_bench_names_the_gpu_and_measures_its_memory(artifact: Path, monkeypatch: Any, capsys: Any) -> None:
    """A copy takes the fake driver a millisecond, whatever is copied."""
    fake = FakeDriver(TWO)
    monkeypatch.setattr(driver, "cu", fake)
    monkeypatch.setattr(accelerator, "COPIED", 1 << 20)
    options = ("--prompt-len", "8", "--gen-len", "4", "--repeat", "1", "--batch", "1", "--json")
    assert run(["bench", str(artifact), "--device", "cuda:1", *options]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["machine"], row["bandwidth_gb_s"]) == ("NVIDIA A100", 2.1)
    assert row["floor_ms"] == pytest.approx(row["step_mb"] / 2.1, rel=0.01)
    assert row["device_bytes"] == 0
    assert not fake.memory, "everything allocated was freed"
    assert run(["bench", str(artifact), "--device", "cuda:2", *options]) == RESOURCE
    assert "no GPU 2: 2 visible" in capsys.readouterr().err


def test_the_artifact_says_which_architectures_were_run(artifact: Path, capsys: Any) -> None:
    assert run(["inspect", str(artifact)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"sm_80 built, never run, sm_90 run on NVIDIA H200", out)
    assert "but for" not in out


def test_a_damaged_cubin_is_named(artifact: Path, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    victim = next((copy / "kernels" / "sm_90").iterdir())
    victim.write_bytes(b"wrong 1")
    assert generate(copy, monkeypatch, FakeDriver()) == ARTIFACT
    assert victim.name in capsys.readouterr().err


FAKE = """
from llmopt.runtime.executors.cuda import driver
from tests.targets.cuda.fake_driver import FakeDriver
driver.cu = FakeDriver()
"""


def test_a_run_needs_no_torch_no_triton_and_no_compiler(artifact: Path, root: Path) -> None:
    line = [sys.executable, "-c", GUARD + FAKE + RUN, "run", str(artifact), "--device", "cuda", "-p", "The"]
    done = subprocess.run([*line, "--max-tokens", "2"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["import torch", "import subprocess; subprocess.run(['nvcc'])"])
def test_the_guard_works(what: str) -> None:
    done = subprocess.run([sys.executable, "-c", GUARD + what], capture_output=True, text=True)
    assert "at run time" in done.stderr


def test_the_startup_benchmark_measures_the_seeded_weights(artifact: Path, tmp_path: Path) -> None:
    startup.draw(artifact, tmp_path / "drawn")
    drawn, seeded = Artifact.open(tmp_path / "drawn"), Artifact.open(artifact)
    ours, theirs = drawn.weight_store(), seeded.weight_store()
    assert drawn.manifest.weights.kind == "embedded"
    for name in seeded.program.weights:
        assert ours.get(name).tobytes() == theirs.get(name).tobytes()


def test_what_is_installed_beside_llmopt_is_small() -> None:
    found = startup.packages()
    assert found["bytes"] <= 200e6, found["packages"]
    assert {"numpy", "cuda-bindings", "tokenizers"} <= set(found["packages"])
    assert not {"torch", "triton"} & set(found["packages"])


@pytest.fixture(scope="module")
def whole(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact with its weights inside."""
    return compile_without_compiler(embedded_model, tmp_path_factory.mktemp("cuda") / "whole", WeightsPlan())


def test_golden_tokens_that_differ_are_an_error(whole: Path, monkeypatch: Any, capsys: Any) -> None:
    assert generate(whole, monkeypatch, FakeDriver()) == EXECUTOR
    assert "golden tokens differ" in capsys.readouterr().err


def test_digests_are_checked_on_the_way(whole: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(cuda, "check_golden", lambda *_, **__: 0)  # kernels that do nothing miss them
    assert generate(whole, monkeypatch, FakeDriver()) == 0
    weights = bytearray((whole / "weights.safetensors").read_bytes())
    weights[-5] ^= 1
    (whole / "weights.safetensors").write_bytes(weights)
    assert generate(whole, monkeypatch, FakeDriver()) == ARTIFACT
    assert "is not what the manifest names" in capsys.readouterr().err
