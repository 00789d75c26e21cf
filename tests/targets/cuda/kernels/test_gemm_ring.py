"""Linears whose weights pass through a ring: the twin against float64, the CUDA form's cubins, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from targets.cuda.cache import CubinCache, Job
from targets.cuda.compile import compile_all, compiler_version
from targets.cuda.fusion import LINEAR
from targets.cuda.kernel import KernelLaunch, Selection
from targets.cuda.kernels.gemm_ring import KERNEL, REGISTERS
from targets.cuda.tuning import linear_form, linear_key
from tests.targets.cuda.kernels import test_w8a8_kernels
from tests.targets.cuda.kernels.harness import close, run, select
from tests.targets.cuda.kernels.test_cubins import coded, linear, quantized
from tests.targets.cuda.kernels.test_fused_linear_kernels import ACTIVATIONS, BF16
from tests.targets.cuda.kernels.test_quantized_kernels import FP16, compute, exact, operands

ONE_BLOCK = {"BN": 64, "WARPGROUPS": 1, "PROGRAMS": 2, "SPLIT": 1, "CLUSTERED": 0, "ROW": 128}
TWO_BLOCKS = {**ONE_BLOCK, "BN": 128}
WIDE = {"BN": 256, "WARPGROUPS": 2, "PROGRAMS": 1, "SPLIT": 1, "CLUSTERED": 0, "ROW": 64}
IN_MEMORY = {"BN": 128, "WARPGROUPS": 2, "PROGRAMS": 1, "SPLIT": 3, "CLUSTERED": 0, "ROW": 64}
IN_CLUSTER = {**ONE_BLOCK, "SPLIT": 2, "CLUSTERED": 1, "ROW": 64}
OF_CODES = [ONE_BLOCK, WIDE, IN_MEMORY, IN_CLUSTER]
OF_NUMBERS = [TWO_BLOCKS, {**TWO_BLOCKS, "SPLIT": 3, "CLUSTERED": 1}, {**TWO_BLOCKS, "SPLIT": 2}]


def named(value: dict[str, Any]) -> str:
    return "-".join(f"{name}={part}" for name, part in value.items())


KINDS: list[dict[str, Any]] = [
    {"bits": 4, "group": 128},
    {"bits": 4, "group": 64, "dtype": FP16},
    {"bits": 4, "group": 128, "zeros": True},
    {"bits": 4, "group": 64, "zeros": True, "dtype": FP16},
    {"bits": 4, "group": 640},
    {"bits": 8, "group": 128},
    {"bits": 8, "group": 64, "zeros": True},
    {"bits": 8, "group": 128, "zeros": True, "dtype": FP16},
    {"bits": 8, "group": 640},
    {"bits": 8, "group": 640, "zeros": True},
    {"bits": 8, "group": 640, "fp8": True},
    {"bits": 8, "group": 128, "fp8": True},
    {"bits": 8, "group": 128, "fp8": True, "dtype": FP16},
    {"bits": 8, "group": 640, "fp8": True, "shared": 16},
]


@pytest.mark.parametrize("way", OF_CODES, ids=named)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_codes(kind: dict[str, Any], way: dict[str, int]) -> None:
    v = operands(3, 80, 640, **kind)
    close(compute(v, way, KERNEL), exact(v), 3.0)


PARTS: list[dict[str, Any]] = [
    {"residual": True, "bias": True},
    {"gate": "silu", "bias": True},
    {"gate": "gelu_tanh", "residual": True},
    {"gate": "relu"},
]


WAYS = {2: IN_CLUSTER, 40: IN_MEMORY, 150: WIDE}


@pytest.mark.parametrize("m", WAYS)
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize("zeros", [False, True])
def test_codes_joined(parts: dict[str, Any], m: int, zeros: bool) -> None:
    v = operands(m, 72 if not zeros else 80, 256, 4, 64, zeros=zeros, **parts)
    close(compute(v, WAYS[m], KERNEL), exact(v), 3.0)


def test_columns_that_end_within_a_unit() -> None:
    for way in OF_CODES:
        for kind in ({"bits": 4, "group": 64}, {"bits": 8, "group": 64, "zeros": True}):
            v = operands(5, 48, 192, **kind)
            close(compute(v, way, KERNEL), exact(v), 3.0)


def dense_operands(m: int, n: int, k: int, dtype: torch.dtype, **parts: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(m * 7919 + n * 31 + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    gate, rows = parts.get("gate"), n if parts.get("gate") is None else 2 * n
    return {
        "input": draw(1, m, k), "weight": draw(rows, k), "bias": draw(rows) if parts.get("bias") else None,
        "norm": None, "eps": 0.0, "offset": 0.0, "gate": gate,
        "residual": draw(1, m, n) if parts.get("residual") else None,
    }  # fmt: skip


def of_numbers(v: dict[str, Any], way: dict[str, int]) -> Tensor:
    (m, k), rows = v["input"].shape[1:], v["weight"].shape[0]
    key = linear_key(str(v["weight"].dtype).removeprefix("torch."), m, rows, k, linear_form(v))
    n = rows if v["gate"] is None else rows // 2
    (out,) = run(KERNEL, LINEAR, v, [((1, m, n), v["input"].dtype)], tuning={KERNEL.name: {key: way}})
    return out


def exact_numbers(v: dict[str, Any]) -> Tensor:
    bias = None if v["bias"] is None else v["bias"].double()
    out = torch.nn.functional.linear(v["input"].double(), v["weight"].double(), bias)
    if v["gate"] is not None:
        gates, ups = out.chunk(2, -1)
        out = ACTIVATIONS[v["gate"]](gates) * ups
    return out if v["residual"] is None else out + v["residual"].double()


@pytest.mark.parametrize("way", OF_NUMBERS, ids=named)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("parts", [{}, *PARTS[:3]], ids=lambda parts: "-".join(parts) or "alone")
def test_numbers(parts: dict[str, Any], dtype: torch.dtype, way: dict[str, int]) -> None:
    for m, n, k in ((3, 80, 200), (40, 72, 640), (130, 136, 264)):
        v = dense_operands(m, n, k, dtype, **parts)
        close(of_numbers(v, way), exact_numbers(v))


BY_CODES: list[dict[str, Any]] = [
    {},
    {"static": True, "shared": 16, "bias": True},
    {"residual": True, "dtype": FP16},
    {"gate": "silu", "bias": True},
    {"gate": "relu", "residual": True},
]


@pytest.mark.parametrize("interval", [128, 256, 0])
@pytest.mark.parametrize("way", OF_NUMBERS, ids=named)
@pytest.mark.parametrize("parts", BY_CODES, ids=lambda parts: "-".join(parts) or "alone")
def test_codes_by_codes(parts: dict[str, Any], way: dict[str, int], interval: int) -> None:
    for m, n, k in ((3, 80, 208), (40, 64, 640), (130, 144, 272)):
        if m < 100 or "gate" not in parts:
            v = {**test_w8a8_kernels.operands(m, n, k, **parts), "interval": interval}
            wide = {"WARPGROUPS": 2, "PROGRAMS": 1} if m > 64 else {}
            close(test_w8a8_kernels.compute(KERNEL, v, {**way, **wide}), test_w8a8_kernels.exact(v))


def test_a_scale_of_another_row_shows() -> None:
    v = test_w8a8_kernels.operands(3, 32, 256)
    right = test_w8a8_kernels.exact(v)
    v["x_scale"] = v["x_scale"].roll(1, 1)
    with pytest.raises(AssertionError, match="error"):
        close(test_w8a8_kernels.compute(KERNEL, v, TWO_BLOCKS), right)


def test_a_shifted_part_shows() -> None:
    v = operands(3, 32, 256, 4, 128)
    right = exact(v)
    v["codes"] = v["codes"].roll(1, 1)
    with pytest.raises(AssertionError, match="error"):
        close(compute(v, IN_CLUSTER, KERNEL), right, 3.0)


def test_a_swapped_gate_shows() -> None:
    v = dense_operands(3, 64, 128, BF16, gate="silu")
    right = exact_numbers(v)
    v["weight"] = v["weight"].roll(64, 0)
    with pytest.raises(AssertionError, match="error"):
        close(of_numbers(v, TWO_BLOCKS), right)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"m": 3, "k": 256, "group": 32}, "int4 codes in chunks of 32 columns"),
    ({"m": 3, "k": 576, "group": 192}, "groups of 192 columns"),
    ({"m": 3, "k": 512, "bits": 8, "group": 128, "fp8": True, "shared": 16}, "scales of 16x128 in bfloat16"),
]


@pytest.mark.parametrize(("shape", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_it_leaves_to_others(shape: dict[str, Any], why: str) -> None:
    v = operands(shape.pop("m"), 32, **shape)
    with pytest.raises(AssertionError, match=why):
        compute(v, IN_MEMORY, KERNEL)


def test_other_tensor_cores_are_refused() -> None:
    for arch in (80, 89, 100):
        assert select(KERNEL, *quantized(8, 512, 1024, 4, 128), arch=arch) == f"sm_{arch} has other tensor cores"


def chosen(call: Any) -> KernelLaunch:
    found = select(KERNEL, *call)
    assert isinstance(found, Selection), found
    return found.launches[0]


def test_untuned_shapes_compile_without_spills(cubins: CubinCache) -> None:
    """And as many programs fit a multiprocessor as their number supposes."""
    jobs = []
    for m in (8, 32, 64, 256):
        jobs += [job(quantized(m, 6144, 4096, 4, 128)), job(quantized(m, 4096, 14336, 8, 14336))]
        jobs += [job(quantized(m, 28672, 4096, 4, 128, gate="silu")), job(linear(m, 4096, 14336))]
        jobs += [job(coded(m, 4096, 14336, "fp8_e4m3"))]
    built = compile_all(jobs, cubins, lambda *_: None)
    for one in jobs:
        programs = dict(one.specialization.constexprs)["PROGRAMS"]
        assert built[one].spills == 0, one.label
        assert programs * (built[one].shared + 1024) <= 228 << 10, one.label
        assert programs * built[one].registers * built[one].threads <= 1 << 16, one.label


def job(call: Any) -> Job:
    return Job(chosen(call).specialization, 90, compiler_version())


def test_registers_of_warpgroups_fit_what_programs_start_with() -> None:
    """Registers are handed from the warpgroup that fills the ring to those that multiply: none are left wanting."""
    for (warpgroups, programs), registers in REGISTERS.items():
        threads = 128 * warpgroups + 128
        first = (1 << 16) // programs // threads // 8 * 8
        assert 128 * (warpgroups * registers + 32) <= first * threads
