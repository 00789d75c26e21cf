"""Linears whose codes pass through a ring: the Triton twin against float64, the Gluon form's cubins."""

from __future__ import annotations

from typing import Any

import pytest

from targets.cuda.cache import CubinCache, Job
from targets.cuda.compile import compile_all, compiler_version
from targets.cuda.kernel import Selection
from targets.cuda.kernels.gemm_q_ring import KERNEL
from tests.targets.cuda.kernels.harness import close, select
from tests.targets.cuda.kernels.test_cubins import quantized
from tests.targets.cuda.kernels.test_quantized_kernels import FP16, compute, exact, operands

WAYS: list[dict[str, int]] = [
    {"BN": 64, "STAGES": 3, "PROGRAMS": 5},
    {"BN": 128, "STAGES": 2, "PROGRAMS": 3},
    {"BN": 64, "STAGES": 4, "PROGRAMS": 264},
]
"""Programs that share tiles, that have several, and more of them than units."""


KINDS: list[dict[str, Any]] = [
    {"bits": 4, "group": 128},
    {"bits": 4, "group": 64, "dtype": FP16},
    {"bits": 8, "group": 128},
    {"bits": 8, "group": 640},
    {"bits": 8, "group": 640, "fp8": True},
    {"bits": 8, "group": 640, "fp8": True, "shared": 16},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_codes(kind: dict[str, Any], way: dict[str, int]) -> None:
    v = operands(3, 80, 640, **kind)
    close(compute(v, way, KERNEL), exact(v))


PARTS: list[dict[str, Any]] = [
    {"residual": True, "bias": True},
    {"gate": "silu", "bias": True},
    {"gate": "gelu_tanh", "residual": True},
]


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts))
def test_codes_joined(parts: dict[str, Any], m: int) -> None:
    v = operands(m, 72, 256, 4, 64, **parts)
    close(compute(v, WAYS[1], KERNEL), exact(v))


def test_a_shifted_part_shows() -> None:
    v = operands(3, 32, 256, 4, 128)
    right = exact(v)
    v["codes"] = v["codes"].roll(1, 1)
    with pytest.raises(AssertionError, match="error"):
        close(compute(v, WAYS[0], KERNEL), right)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"m": 65, "k": 256, "group": 128}, "more than 64 rows"),
    ({"m": 3, "k": 256, "group": 32}, "int4 codes in chunks of 32 columns"),
    ({"m": 3, "k": 256, "group": 128, "zeros": True}, "int4 zeros codes in chunks of 128 columns"),
    ({"m": 3, "k": 512, "group": 256}, "scales of 1x256 in bfloat16"),
    ({"m": 3, "k": 512, "bits": 8, "group": 128, "fp8": True, "shared": 16}, "scales of 16x128 in bfloat16"),
]


@pytest.mark.parametrize(("shape", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_it_leaves_to_others(shape: dict[str, Any], why: str) -> None:
    v = operands(shape.pop("m"), 32, **shape)
    with pytest.raises(AssertionError, match=why):
        compute(v, WAYS[0], KERNEL)


def test_other_tensor_cores_are_refused() -> None:
    for arch in (80, 89, 100):
        assert select(KERNEL, *quantized(8, 512, 1024, 4, 128), arch=arch) == f"sm_{arch} has other tensor cores"


@pytest.mark.slow
def test_two_programs_fit_a_multiprocessor(cubins: CubinCache) -> None:
    """In shared memory and in registers, as their number supposes."""
    jobs = []
    for m in (8, 32, 64):
        for call in (quantized(m, 6144, 4096, 4, 128), quantized(m, 4096, 14336, 8, 14336), gated(m)):
            found = select(KERNEL, *call)
            assert isinstance(found, Selection), found
            jobs.append(Job(found.launches[0].specialization, 90, compiler_version()))
    built = compile_all(jobs, cubins, lambda *_: None)
    for job in jobs:
        assert built[job].spills == 0, job.label
        assert 2 * built[job].shared <= 227 << 10, job.label
        assert 2 * built[job].registers * built[job].threads <= 1 << 16, job.label


def gated(m: int) -> Any:
    """Gate and up of an 8B layer."""
    return quantized(m, 28672, 4096, 4, 128, gate="silu")
