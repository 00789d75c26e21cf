"""Linears whose weights pass through a ring: the Triton twin against float64, the Gluon form's cubins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from targets.cuda.cache import CubinCache, Job
from targets.cuda.compile import compile_all
from targets.cuda.kernel import Selection
from targets.cuda.kernels.gemm_ring import KERNELS
from tests.targets.cuda.kernels import test_linear_forms as forms
from tests.targets.cuda.kernels import test_linear_kernels as plain
from tests.targets.cuda.kernels.harness import close, run, select
from tests.targets.cuda.kernels.test_cubins import linear, quantized
from tests.targets.cuda.kernels.test_quantized_kernels import FP16, compute, exact, operands

DENSE, CODES = KERNELS
WAYS: list[dict[str, int]] = [
    {"BN": 64, "G": 1, "STAGES": 3, "PROGRAMS": 5},
    {"BN": 128, "G": 2, "STAGES": 2, "PROGRAMS": 3},
    {"BN": 64, "G": 1, "STAGES": 4, "PROGRAMS": 264},
]
"""Programs that share tiles, that have several, and more of them than units."""
by_values: Any = lambda way: "-".join(map(str, way.values()))  # noqa: E731


@pytest.mark.parametrize("way", WAYS, ids=by_values)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 64), (3, 200, 328), (33, 130, 200)])
def test_weights(m: int, n: int, k: int, way: dict[str, int]) -> None:
    plain.check(DENSE, plain.operands(m, n, k, torch.float16 if m == 3 else torch.bfloat16, m % 2 == 1), way)


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: "-".join(form))
def test_weights_joined(form: dict[str, Any]) -> None:
    v = forms.operands(9, 176, 136, **form)
    n, gated = (88, " gated") if v["gate"] is not None else (176, "")
    tuning = {DENSE.name: {f"bfloat16 9x176x136{gated}": WAYS[1]}}
    (out,) = run(DENSE, forms.LINEAR, v, [((1, 9, n), torch.bfloat16)], tuning=tuning)
    close(out, forms.exact(v))


KINDS: list[dict[str, Any]] = [
    {"bits": 4, "group": 128},
    {"bits": 4, "group": 64, "dtype": FP16},
    {"bits": 8, "group": 128},
    {"bits": 8, "group": 640},
    {"bits": 8, "group": 640, "fp8": True},
    {"bits": 8, "group": 640, "fp8": True, "shared": 16},
]


@pytest.mark.parametrize("way", WAYS, ids=by_values)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_codes(kind: dict[str, Any], way: dict[str, int]) -> None:
    v = operands(3, 80, 640, **kind)
    close(compute(v, way, CODES), exact(v))


PARTS: list[dict[str, Any]] = [
    {"residual": True, "bias": True},
    {"gate": "silu", "bias": True},
    {"gate": "gelu_tanh", "residual": True},
]


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts))
def test_codes_joined(parts: dict[str, Any], m: int) -> None:
    v = operands(m, 72, 256, 4, 64, **parts)
    close(compute(v, WAYS[1], CODES), exact(v))


def test_a_shifted_part_shows() -> None:
    v = operands(3, 32, 256, 4, 128)
    right = exact(v)
    v["codes"] = v["codes"].roll(1, 1)
    with pytest.raises(AssertionError, match="error"):
        close(compute(v, WAYS[0], CODES), right)


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
        compute(v, WAYS[0], CODES)


def test_other_tensor_cores_are_refused() -> None:
    for arch in (80, 89, 100):
        assert select(CODES, *quantized(8, 512, 1024, 4, 128), arch=arch) == f"sm_{arch} has other tensor cores"


def test_a_ring_leaves_room_for_the_next_kernel(tmp_path: Path) -> None:
    """Two programs fit a multiprocessor, in shared memory and in registers, so that the next kernel's copies start."""
    jobs = []
    for kernel, call in (
        (DENSE, linear(8, 6144, 4096)), (CODES, quantized(8, 512, 1024, 4, 128)),
        (CODES, quantized(64, 4096, 14336, 8, 14336)), (CODES, quantized(32, 28672, 4096, 4, 128, gate="silu")),
    ):  # fmt: skip
        found = select(kernel, *call)
        assert isinstance(found, Selection), found
        jobs.append(Job(found.launches[0].specialization, 90, "test"))
    built = compile_all(jobs, CubinCache(tmp_path), lambda *_: None)
    for job in jobs:
        assert built[job].spills == 0, job.label
        assert 2 * built[job].shared <= 227 << 10
        assert built[job].registers * built[job].threads <= 1 << 15
