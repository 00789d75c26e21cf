"""Linears of many rows by clusters: the twin against float64, the CUDA form's cubins, tilings, and what is refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from targets.cuda.cache import CubinCache, Job
from targets.cuda.compile import compile_all, compiler_version
from targets.cuda.fusion import LINEAR
from targets.cuda.kernel import CallSite, KernelLaunch, Selection
from targets.cuda.kernels._common import cdiv
from targets.cuda.kernels.gemm_cluster import BM, CLUSTERS, KERNEL, STAGING, Tiling, tilings
from targets.cuda.tuning import linear_form, linear_key
from tests.targets.cuda.kernels.harness import close, run, select
from tests.targets.cuda.kernels.test_cubins import bf16, joined, linear
from tests.targets.cuda.kernels.test_fused_linear_kernels import BF16
from tests.targets.cuda.kernels.test_gemm_ring import dense_operands, exact_numbers
from tests.targets.cuda.kernels.test_quantized_kernels import FP16

WAYS = [Tiling(96), Tiling(128, SHARE=2), Tiling(256, SHARE=2), Tiling(128, SPLIT=2), Tiling(192, SHARE=2, SPLIT=2)]
PARTS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"gate": "silu", "bias": True},
    {"gate": "gelu_tanh"},
]


class AsTold:
    """The kernel, which must have taken the tiling that the table holds."""

    name, ops = KERNEL.name, KERNEL.ops

    def select(self, site: CallSite) -> Selection | str:
        found = KERNEL.select(site)
        assert isinstance(found, Selection), found
        assert found.reason.endswith(", tuned"), found.reason
        return found


def computed(v: dict[str, Any], way: Tiling) -> Tensor:
    (m, k), rows = v["input"].shape[1:], v["weight"].shape[0]
    key = linear_key(str(v["weight"].dtype).removeprefix("torch."), cdiv(m, BM) * BM, rows, k, linear_form(v))
    n = rows if v["gate"] is None else rows // 2
    (out,) = run(AsTold(), LINEAR, v, [((1, m, n), v["input"].dtype)], tuning={KERNEL.name: {key: asdict(way)}})
    return out


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts) or "alone")
def test_against_float64(parts: dict[str, Any], dtype: torch.dtype, way: Tiling) -> None:
    """Rows that end within a tile and within a cluster's second one; weights and columns that end within a box."""
    for m, n, k in ((129, 136, 264), (256, 72, 640), (300, 264, 200)):
        v = dense_operands(m, n, k, dtype, **parts)
        close(computed(v, way), exact_numbers(v))


def test_a_swapped_gate_shows() -> None:
    v = dense_operands(130, 64, 128, BF16, gate="silu")
    right = exact_numbers(v)
    v["weight"] = v["weight"].roll(64, 0)
    with pytest.raises(AssertionError, match="error"):
        close(computed(v, Tiling(128, SHARE=2)), right)


@given(st.integers(129, 1023), st.integers(1, 4000), st.integers(1, 2000), st.booleans())
def test_tilings_cover_every_shape_with_what_a_multiprocessor_has(m: int, eighths: int, ks: int, gated: bool) -> None:
    n, k = 8 * eighths * (2 if gated else 1), 8 * ks
    found = tilings(m, n, k, gated)
    assert found
    for tiling in found:
        stages = tiling.stages(k)
        assert stages >= 2
        assert stages * (tiling.slot + 16) + STAGING + 1024 <= 228 << 10
        if tiling.SPLIT > 1:
            assert stages * tiling.slot >= 4 * BM * tiling.BN
            assert tiling.tiles(m, n, gated) <= CLUSTERS[tiling.SHARE * tiling.SPLIT]


def chosen(call: Any, tuning: Any = None) -> Selection:
    found = select(KERNEL, *call, tuning=tuning)
    assert isinstance(found, Selection), found
    return found


def test_other_rows_get_what_the_model_says() -> None:
    """A tiling measured at 512 rows makes four tiles of 384."""
    tuning = {KERNEL.name: {"bfloat16 512x4096x4096": {"BN": 128, "SHARE": 2, "SPLIT": 1, "us": 1.0}}}
    assert chosen(linear(512, 4096, 4096), tuning).reason.endswith(
        "128x128 tiles, 2 tiles of rows share the weight, tuned"
    )
    other = chosen(linear(384, 4096, 4096), tuning)
    assert other.reason.endswith("128x192 tiles, K in 2 parts of a cluster, modelled")
    assert other.cost_us > 1.0


def test_what_it_leaves_to_others() -> None:
    for m in (128, 1024):
        assert select(KERNEL, *linear(m, 4096, 4096)) == f"{m} rows"
    assert select(KERNEL, *joined(4096, 4096, m=256, residual=bf16("r", 1, 256, 4096))) == "it adds no residual"
    assert select(KERNEL, *linear(256, 4096, 4100)) == "the copy engine cannot move the operands"
    for arch in (80, 89, 100):
        assert select(KERNEL, *linear(256, 4096, 4096), arch=arch) == f"sm_{arch} has other tensor cores"


def test_tilings_compile_without_spills(cubins: CubinCache) -> None:
    """Registers go from the warps that ask for boxes to those that multiply: none are left wanting."""
    launches = [chosen(linear(m, n, k)).launches[0] for m in (256, 384, 512) for n, k in ((6144, 4096), (4096, 14336))]
    launches += [tiled(way) for way in WAYS]
    jobs = [Job(launch.specialization, 90, compiler_version()) for launch in launches]
    built = compile_all(jobs, cubins, lambda *_: None)
    for job in jobs:
        assert built[job].spills == 0, job.label
        assert built[job].shared + 1024 <= 228 << 10, job.label
        assert 256 * 232 + 128 * 40 <= built[job].registers * built[job].threads <= 1 << 16, job.label


def tiled(way: Tiling) -> KernelLaunch:
    key = linear_key("bfloat16", 256, 4096, 4096)
    return chosen(linear(256, 4096, 4096), {KERNEL.name: {key: asdict(way)}}).launches[0]
