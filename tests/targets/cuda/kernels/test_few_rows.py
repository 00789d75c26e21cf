"""Linears of few rows over codes: the Triton twin against float64, the Gluon form's cubins and its PTX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from targets.cuda.cache import CubinCache, Job
from targets.cuda.compile import compile_all, compiler_version
from targets.cuda.kernel import Selection
from targets.cuda.kernels import gemm_q_few
from targets.cuda.kernels._fragments import FORMS
from tests.targets.cuda.kernels.harness import close, select
from tests.targets.cuda.kernels.test_cubins import quantized
from tests.targets.cuda.kernels.test_dequantize import evaluate
from tests.targets.cuda.kernels.test_fused_linear_kernels import BF16, FP16
from tests.targets.cuda.kernels.test_quantized_kernels import compute, exact, operands

DTYPES = {"bf16": BF16, "fp16": FP16}
WAYS: list[dict[str, int]] = [
    {"BN": 16, "K_WARPS": 4, "ROW_WARPS": 1, "DEPTH": 1, "SPLIT": 1},
    {"BN": 32, "K_WARPS": 2, "ROW_WARPS": 1, "DEPTH": 2, "SPLIT": 2},
    {"BN": 64, "K_WARPS": 1, "ROW_WARPS": 4, "DEPTH": 1, "SPLIT": 3},
]
KINDS: list[dict[str, Any]] = [
    {"bits": 4, "group": 128},
    {"bits": 4, "group": 64, "zeros": True},
    {"bits": 4, "group": 256, "zeros": True, "dtype": FP16},
    {"bits": 8, "group": 128},
    {"bits": 8, "group": 640},
    {"bits": 8, "group": 640, "fp8": True},
    {"bits": 8, "group": 128, "fp8": True, "shared": 16},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_codes(kind: dict[str, Any], way: dict[str, int]) -> None:
    """640 columns are five chunks, of 64 ten: no way divides them evenly."""
    k = 768 if kind["group"] == 256 else 640
    v = operands(3, 80, k, **kind)
    close(compute(v, way, gemm_q_few.KERNEL), exact(v))


PARTS: list[dict[str, Any]] = [
    {"residual": True, "bias": True},
    {"gate": "silu", "bias": True, "zeros": True},
    {"gate": "gelu_tanh", "residual": True},
]


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts))
def test_codes_joined(parts: dict[str, Any], m: int) -> None:
    v = operands(m, 70, 256, 4, 64, **parts)
    close(compute(v, WAYS[1], gemm_q_few.KERNEL), exact(v))


def test_a_shifted_part_shows() -> None:
    v = operands(3, 32, 256, 4, 128)
    right = exact(v)
    v["codes"] = v["codes"].roll(1, 1)
    with pytest.raises(AssertionError, match="error"):
        close(compute(v, WAYS[0], gemm_q_few.KERNEL), right)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"m": 17, "k": 256, "group": 128}, "more than 16 rows"),
    ({"m": 3, "k": 256, "group": 32}, "int4 codes in chunks of 32 columns"),
    ({"m": 3, "k": 256, "bits": 8, "group": 128, "zeros": True}, "int8 zeros codes in chunks of 128 columns"),
    ({"m": 3, "k": 300, "bits": 8, "group": 300}, "int8 codes in chunks of 128 columns"),
]


@pytest.mark.parametrize(("shape", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_it_leaves_to_its_twin(shape: dict[str, Any], why: str) -> None:
    v = operands(shape.pop("m"), 32, **shape)
    with pytest.raises(AssertionError, match=why):
        compute(v, WAYS[0], gemm_q_few.KERNEL)


@pytest.mark.parametrize("type_", ["bf16", "fp16"])
def test_the_ptx_of_every_code(type_: str) -> None:
    """Each result of two halfwords is a register of its own; what the registers are joined from is evaluated."""
    exponent = {"bf16": 128, "fp16": 1024}[type_]
    expected: dict[str, Callable[[int], float]] = {
        "int4": lambda code: code - 8,
        "int4 zeros": lambda code: code - 3,
        "int8": lambda code: code - 256 * (code >> 7),
        "fp8_e4m3": lambda code: torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).item(),
    }
    addend = torch.tensor([-exponent - 3.0] * 2).to(DTYPES[type_]).view(torch.int16).numpy().view("<u4")[0]
    for form, value in expected.items():
        bits = 4 if form.startswith("int4") else 8
        for part, asm in enumerate(FORMS[type_][form]):
            whole, end = asm.split("mov.b32 {$0, $1}, w")
            assert end == "; }"
            for code in range(1 << bits):
                if form == "fp8_e4m3" and code & 0x7F == 0x7F:
                    continue  # NaN
                word = code << bits * part | (code ^ 1) << bits * part + 16
                found = evaluate(whole.replace("$3", hex(addend)), word, type_)
                assert found[-2:] == [value(code), value(code ^ 1)] or code ^ 1 in (0x7F, 0xFF)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_builds_without_spills(arch: int, cubins: CubinCache) -> None:
    jobs = []
    for m in (1, 8, 16):
        for call in (
            quantized(m, 6144, 4096, 4, 128), quantized(m, 28672, 4096, 4, 64, True, gate="silu"),
            quantized(m, 4096, 14336, 8, 14336),
        ):  # fmt: skip
            found = select(gemm_q_few.KERNEL, *call, arch=arch)
            assert isinstance(found, Selection), found
            jobs.append(Job(found.launches[0].specialization, arch, compiler_version()))
    built = compile_all(jobs, cubins, lambda *_: None)
    assert max(built[job].spills for job in jobs) <= (
        8 if arch == 80 else 0
    )  # int4 with zero points, to be tuned there


def test_only_the_last_sums_pass_through_shared_memory(cubins: CubinCache) -> None:
    found = select(gemm_q_few.KERNEL, *quantized(8, 512, 1024, 4, 128))
    assert isinstance(found, Selection)
    job = Job(found.launches[0].specialization, 90, compiler_version())
    shared = compile_all([job], cubins, lambda *_: None)[job].shared
    assert 0 < shared <= 8 * 16 * 8 * 4
