"""Sums of FP8 products that stay in the tensor cores, or leave them after more columns than usual."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from triton import knobs

from targets.cuda.cache import CubinCache, Job
from targets.cuda.compile import compile_all, compiler_version
from targets.cuda.eight_bits import ALL_COLUMNS, INTERVAL
from targets.cuda.kernel import Kernel, Selection
from targets.cuda.kernels import gemm_w8a8, gemm_w8a8_persistent
from targets.cuda.tuning.candidates import candidates
from tests.targets.cuda.gpu.cases import WIDE_K
from tests.targets.cuda.kernels.harness import close, select
from tests.targets.cuda.kernels.test_cubins import bf16, coded
from tests.targets.cuda.kernels.test_fused_linear_kernels import FP16
from tests.targets.cuda.kernels.test_w8a8_kernels import FP8, INT8, PARTS, compute, exact, operands

TILED = {"BM": 128, "BN": 64, "BK": 64, "SPLIT": 2, "SWAP": 0, "AHEAD": 0, "warps": 4, "stages": 3}
WALKED = {"BM": 32, "BN": 64, "BK": 64, "TALL": 2, "PARTS": 2, "warps": 4, "stages": 3}
KERNELS = [(gemm_w8a8.KERNEL, TILED), (gemm_w8a8_persistent.KERNEL, WALKED)]


@pytest.mark.parametrize("interval", [ALL_COLUMNS, 128, 256])
@pytest.mark.parametrize(("kernel", "config"), KERNELS, ids=["tiled", "walked"])
@pytest.mark.parametrize("parts", [{}, *PARTS], ids=lambda parts: "-".join(parts) or "plain")
def test_every_column_is_summed_once(
    parts: dict[str, Any], kernel: Kernel, config: dict[str, int], interval: int
) -> None:
    """K is no multiple of the longest interval."""
    v = operands(70, 96 if "gate" in parts else 128, 448, **parts)
    close(compute(kernel, {**v, "interval": interval}, config), exact(v))


@pytest.mark.parametrize("interval", [ALL_COLUMNS, INTERVAL])
@pytest.mark.parametrize(("kernel", "config"), KERNELS, ids=["tiled", "walked"])
def test_many_columns(kernel: Kernel, config: dict[str, int], interval: int) -> None:
    """On a GPU, where the recorded launches run again and the two ways to sum differ, long sums lose most."""
    v = operands(70, 64, WIDE_K, dtype=FP16)
    close(compute(kernel, {**v, "interval": interval}, {**config, "BM": 128, "BK": 128, "SPLIT": 1}), exact(v))


def test_a_sum_that_is_left_behind_is_noticed() -> None:
    """The control: the last columns are of no interval that is full."""
    v = operands(70, 128, 448)
    out = compute(gemm_w8a8_persistent.KERNEL, {**v, "interval": 256}, WALKED)
    v["x"][..., 256:] = 0
    with pytest.raises(AssertionError, match="error"):
        close(out, exact(v))


@pytest.mark.parametrize("given", [{"format": INT8}, {"format": FP8, "group": 64, "shared": 64}], ids=str)
@pytest.mark.parametrize("kernel", [kernel for kernel, _ in KERNELS], ids=lambda kernel: kernel.name)
def test_what_is_not_summed_in_fp8_over_all_columns_is_refused(kernel: Kernel, given: dict[str, Any]) -> None:
    v = operands(70, 128, 256, **given)
    with pytest.raises(AssertionError, match="no sums of all columns"):
        compute(kernel, {**v, "interval": ALL_COLUMNS})


def choice(kernel: Kernel, config: dict[str, int] | None = None, rows: int = 2048, **parts: Any) -> Selection:
    """What a kernel answers for the output projection of the 8B shape, gate and up where they are gated."""
    call = coded(rows, 28672 if "gate" in parts else 4096, 4096, **parts)
    tuning = {kernel.name: {"w8a8-fp8 2048x4096x4096": config}} if config else {}
    found = select(kernel, *call, tuning=tuning)
    assert isinstance(found, Selection), found
    return found


def test_the_reason_and_the_constants_say_which_sums() -> None:
    for kernel, _ in KERNELS:
        fast, usual = choice(kernel, interval=ALL_COLUMNS), choice(kernel)
        assert "fp8 with fast accumulation, a channel" in fast.reason
        assert "fast" not in usual.reason
        constants = [dict(found.launches[0].specialization.constexprs) for found in (fast, usual)]
        assert [c["INTERVAL"] for c in constants] == [ALL_COLUMNS, INTERVAL]
    assert "summed over 256 columns" in choice(gemm_w8a8_persistent.KERNEL, interval=256).reason


def test_what_was_measured_of_one_serves_no_other() -> None:
    kernel, config = gemm_w8a8_persistent.KERNEL, {**WALKED, "us": 1.0}
    assert choice(kernel, config).reason.endswith("tuned")
    for interval in (ALL_COLUMNS, 256):
        assert choice(kernel, config, interval=interval).reason.endswith("modelled")


def test_wide_tiles_are_taken_where_they_fit_in_registers() -> None:
    kernel = gemm_w8a8_persistent.KERNEL
    assert "128x256x128 tiles" in choice(kernel, interval=ALL_COLUMNS).reason
    assert "128x128x128 tiles" in choice(kernel).reason


def job(found: Selection) -> Job:
    return Job(found.launches[0].specialization, 90, compiler_version())


def instructions(cubin: bytes, path: Path) -> tuple[int, int]:
    """How many FP8 products and how many additions in fp32 a kernel's machine code holds."""
    path.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return len(re.findall(r"\bQGMMA\b", text)), len(re.findall(r"\bFADD\b", text))


@pytest.mark.slow
def test_fast_sums_are_not_added_again(cubins: CubinCache, tmp_path: Path) -> None:
    """The control: usual sums are, one addition a thread for each of its 64 sums of a 128x128 tile."""
    config = {"BM": 128, "BN": 128, "BK": 128, "TALL": 8, "PARTS": 1, "warps": 8, "stages": 4}
    kernel = gemm_w8a8_persistent.KERNEL
    key = "w8a8-fp8-fast 2048x4096x4096"
    fast = select(kernel, *coded(2048, 4096, 4096, interval=ALL_COLUMNS), tuning={kernel.name: {key: config}})
    assert isinstance(fast, Selection), fast
    jobs = [job(fast), job(choice(kernel, config))]
    built = compile_all(jobs, cubins, lambda *_: None)
    few, many = (instructions(built[x].cubin, tmp_path / "kernel.cubin") for x in jobs)
    assert few[0] == many[0] > 0
    assert (few[1], many[1]) == (0, 64)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [ALL_COLUMNS, 256, 512])
def test_what_is_tried_builds_without_spills(interval: int, cubins: CubinCache) -> None:
    """Every candidate, with gate, residual and neither."""
    jobs = []
    for kernel, rows in ((gemm_w8a8_persistent.KERNEL, 2048), (gemm_w8a8.KERNEL, 256)):
        for parts in ({}, {"gate": "silu"}, {"residual": bf16("r", 1, rows, 4096)}):
            call = coded(rows, 28672 if "gate" in parts else 4096, 4096, interval=interval, **parts)
            key, configs = tried(kernel, call)
            for config in configs if kernel is gemm_w8a8_persistent.KERNEL or interval == ALL_COLUMNS else ():
                found = select(kernel, *call, tuning={kernel.name: {key: config}})
                assert isinstance(found, Selection), found
                jobs.append(job(found))
    built = compile_all(jobs, cubins, lambda *_: None)
    for one in jobs:
        assert built[one].spills == 0, one.label
        assert built[one].shared <= 227 << 10, one.label


def tried(kernel: Kernel, call: tuple[str, dict[str, Any], Any, str]) -> tuple[str, list[dict[str, Any]]]:
    """The key and the configurations of a call."""
    seen: list[Any] = []

    class Spy:
        name, ops = kernel.name, kernel.ops

        def select(self, site: Any) -> str:
            seen.append(site)
            return ""

    select(Spy(), *call)
    found = candidates(kernel.name, seen[0])
    assert found is not None
    return found
