"""Linears of codes by codes, alone and joined with gate and residual, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.ir.ops.linear import dequantize
from llmopt.ir.ops.rounding import LIMITS
from targets.cuda.eight_bits import CODES, LINEAR_8
from targets.cuda.kernel import Kernel
from targets.cuda.kernels import gemm_w8a8, gemm_w8a8_persistent, gemv_w8a8
from targets.cuda.tuning import linear_form, linear_key, quantized_form
from tests.targets.cuda.kernels.harness import close, run
from tests.targets.cuda.kernels.test_fused_linear_kernels import ACTIVATIONS, BF16, FP16

INT8, FP8 = "int8", "fp8_e4m3"


def operands(
    m: int, n: int, k: int, format: str = FP8, group: int = 0, *, shared: int = 1, static: bool = False,
    dtype: torch.dtype = BF16, bias: bool = False, gate: str | None = None, residual: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """x (1, m, k) as codes with its scales; codes (n or 2n, k), scales (n or 2n over shared, k / group), and what the
    call joins."""
    random = torch.Generator().manual_seed(m * 7919 + n * 31 + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    rows, group, kind = n if gate is None else 2 * n, group or k, getattr(torch, CODES[format])
    x, codes, scale = draw(1, m, k), draw(rows, k), torch.rand((1, m), generator=random) / LIMITS[format]
    input_scale = torch.tensor([2 / LIMITS[format]]) if static else None
    return {
        "x": whole(60 * x, format).to(kind), "x_scale": input_scale if static else scale,
        "input_scale": input_scale, "round": format, "codes": whole(60 * codes, format).to(kind),
        "scales": (torch.rand((rows // shared, k // group), generator=random) / 60 + 0.001).to(dtype),
        "bias": draw(rows) if bias else None, "format": "int" if format == INT8 else format, "bits": 8,
        "block_n": shared, "block_k": group, "gate": gate, "residual": draw(1, m, n) if residual else None,
    }  # fmt: skip


def whole(x: Tensor, format: str) -> Tensor:
    return x.float().round().clamp(-127, 127) if format == INT8 else x


def exact(v: dict[str, Any]) -> Tensor:
    """The call in float64."""
    x = v["x"].double() * v["x_scale"].double().reshape(-1, 1)
    codes = v["codes"] if v["format"] != "int" else (v["codes"].short() + 128).to(torch.uint8)
    weight = dequantize(codes, v["scales"], None, None, v["format"], 8, v["block_n"], v["block_k"]).double()
    out = torch.nn.functional.linear(x, weight)
    if v["bias"] is not None:
        out = out + v["bias"].double()
    if v["gate"] is not None:
        a, b = out.chunk(2, dim=-1)
        out = ACTIVATIONS[v["gate"]](a) * b
    return out if v["residual"] is None else out + v["residual"].double()


def compute(kernel: Kernel, v: dict[str, Any], config: dict[str, int] | None = None) -> Tensor:
    """The kernel, with a configuration as if it had been tuned."""
    (m, k), rows = v["x"].shape[1:], v["codes"].shape[0]
    key = linear_key(quantized_form(v, k), m, rows, k, linear_form(v))
    tuning = {kernel.name: {key: config}} if config else None
    out_type = v["scales"].dtype
    n = rows if v["gate"] is None else rows // 2
    given = {**v, "scales": v["scales"].T.contiguous()}
    (out,) = run(kernel, LINEAR_8, given, [((1, m, n), out_type)], tuning=tuning)
    return out


FORMS: list[dict[str, Any]] = [
    {"format": FP8},
    {"format": INT8, "dtype": FP16},
    {"format": FP8, "shared": 32, "group": 64},
    {"format": INT8, "group": 32},
    {"format": FP8, "static": True, "shared": 0},
    {"format": INT8, "static": True},
]


def form(given: dict[str, Any], n: int) -> dict[str, Any]:
    """The form for n weight rows: ``shared`` 0 is one scale a tensor."""
    shared = given.get("shared", 1) or n
    return {**given, "shared": shared if n % shared == 0 else 1}


@pytest.mark.parametrize("given", FORMS, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 32), (17, 65)])
def test_codes(m: int, n: int, given: dict[str, Any]) -> None:
    v = operands(m, n, 256, **form(given, n))
    close(compute(gemm_w8a8.KERNEL, v), exact(v))


@pytest.mark.parametrize("format", [INT8, FP8])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (2, 33, 65), (70, 9, 300)])
def test_codes_of_any_length(m: int, n: int, k: int, format: str) -> None:
    v = operands(m, n, k, format)
    close(compute(gemm_w8a8.KERNEL, v), exact(v))


PARTS: list[dict[str, Any]] = [
    {"residual": True, "bias": True},
    {"gate": "silu", "bias": True},
    {"gate": "relu", "residual": True},
]


@pytest.mark.parametrize(("swap", "split"), [(1, 3), (0, 2)])
@pytest.mark.parametrize("given", FORMS[:3], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts))
def test_joined(parts: dict[str, Any], given: dict[str, Any], swap: int, split: int) -> None:
    v = operands(5, 96, 256, **{**given, **parts})
    config = {"BM": 16, "BN": 64, "BK": 64, "SPLIT": split, "SWAP": swap, "AHEAD": 0, "warps": 4, "stages": 3}
    close(compute(gemm_w8a8.KERNEL, v, config), exact(v))


@pytest.mark.parametrize("given", [*FORMS[:2], {"shared": 128, "group": 64}, FORMS[4]], ids=str)
@pytest.mark.parametrize("parts", [{}, PARTS[0], PARTS[1]], ids=lambda parts: "-".join(parts) or "plain")
def test_persistent(parts: dict[str, Any], given: dict[str, Any]) -> None:
    """Of gated ones a block of rows lies in both halves."""
    n = 192 if "gate" in parts else 128
    v = operands(70, n, 128, **{**form(given, 2 * n if "gate" in parts else n), **parts})
    config = {"BM": 32, "BN": 64, "BK": 64, "TALL": 2, "PARTS": 2, "warps": 4, "stages": 3}
    close(compute(gemm_w8a8_persistent.KERNEL, v, config), exact(v))


def test_scales_of_a_row_and_group_are_left_to_the_other_kernel() -> None:
    v = operands(70, 96, 256, INT8, 32)
    with pytest.raises(AssertionError, match="would spill registers"):
        compute(gemm_w8a8_persistent.KERNEL, v)


@pytest.mark.parametrize("given", FORMS, ids=str)
@pytest.mark.parametrize("parts", [{}, *PARTS], ids=lambda parts: "-".join(parts) or "plain")
def test_one_row(parts: dict[str, Any], given: dict[str, Any]) -> None:
    v = operands(1, 64, 192, **{**form(given, 128 if "gate" in parts else 64), **parts})
    close(compute(gemv_w8a8.KERNEL, v, {"rows": 4, "block": 16, "warps": 1}), exact(v))


@pytest.mark.parametrize("format", [INT8, FP8])
@pytest.mark.parametrize(("n", "k"), [(1, 8), (33, 72), (9, 304)])
def test_one_row_of_several_lengths(n: int, k: int, format: str) -> None:
    v = operands(1, n, k, format)
    close(compute(gemv_w8a8.KERNEL, v), exact(v))


def test_every_code_of_one_row_is_the_number_it_stands_for() -> None:
    for format in (INT8, FP8):
        v = operands(1, 256, 8, format)
        codes = torch.arange(256, dtype=torch.uint8)
        codes[codes & 127 == 127] = 0 if format == FP8 else 127
        v["codes"] = torch.cat((codes[:, None], torch.zeros((256, 7), dtype=torch.uint8)), 1).view(v["codes"].dtype)
        close(compute(gemv_w8a8.KERNEL, v), exact(v))


@pytest.mark.parametrize("wrong", ["x_scale", "scales", "codes"])
def test_an_operand_of_another_row_is_noticed(wrong: str) -> None:
    v = operands(3, 32, 256, group=64)
    out = compute(gemm_w8a8.KERNEL, v)
    v[wrong] = v[wrong].roll(1, -1)
    with pytest.raises(AssertionError, match="error"):
        close(out, exact(v))
