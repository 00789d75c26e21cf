"""Activations rounded to codes, alone, after a norm and after a gate: the reference's codes, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.ir.ops.rounding import LIMITS, round_activations
from targets.cuda.eight_bits import CODES, NORM_ROUNDED, ROUND, ROUNDED
from targets.cuda.kernels import gate, norm, rounding
from tests.targets.cuda.kernels.harness import run

FORMATS = ["int8", "fp8_e4m3"]
STATIC = [None, 0.013, 0.0]
FP16 = torch.float16
"""The interpreter truncates to bfloat16, so that only float16 shows what a GPU computes, bit for bit."""


def rows(m: int, k: int) -> Tensor:
    """Rows over many orders of magnitude, the first of several zero."""
    random = torch.Generator().manual_seed(m * 31 + k)
    x = torch.randn((1, m, k), generator=random) * torch.logspace(-4, 1, k)
    x[:, 0] *= m == 1
    return x.to(FP16)


def coded(x: Tensor, scale: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows, by the definition of ``llmopt.round_activations``."""
    used = x.float().abs().amax(-1, keepdim=True) / LIMITS[format] if scale is None else scale
    used = torch.where(used == 0, 1.0, used)
    codes = (x.float() / used).clamp(-LIMITS[format], LIMITS[format])
    codes = codes.round() if format == "int8" else codes
    return codes.to(getattr(torch, CODES[format])), used[..., 0]


def outputs(m: int, k: int, format: str, static: Tensor | None) -> list[Any]:
    made: list[Any] = [((1, m, k), getattr(torch, CODES[format]))]
    return made + ([((1, m), torch.float32)] if static is None else [])


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def scale_of(value: float | None) -> Tensor | None:
    return None if value is None else torch.tensor([value])


@pytest.mark.parametrize("value", STATIC)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 17), (2, 1024)])
def test_codes(m: int, k: int, format: str, value: float | None) -> None:
    x, scale = rows(m, k), scale_of(value)
    codes, scales = coded(x, scale, format)
    found = run(rounding.KERNEL, ROUNDED, {"x": x, "scale": scale, "format": format}, outputs(m, k, format, scale))
    assert same(found[0], codes)
    assert value is not None or torch.equal(found[1], scales)
    (numbers,) = run(rounding.KERNEL, ROUND, {"x": x, "scale": scale, "format": format}, [(x.shape, FP16)])
    assert same(numbers, round_activations(x, scale, format))


def test_every_fp8_value_and_the_middles_between() -> None:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2, -values, values + 2**-14])[None, None].to(FP16)
    one = torch.ones(1)
    call = {"x": x, "scale": one, "format": "fp8_e4m3"}
    (found,) = run(rounding.KERNEL, ROUNDED, call, outputs(1, x.shape[-1], "fp8_e4m3", one))
    assert same(found, coded(x, one, "fp8_e4m3")[0])
    assert not same(found, coded(x * 1.01, one, "fp8_e4m3")[0])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", STATIC[:2])
def test_a_gated_activation(format: str, value: float | None) -> None:
    x, scale = rows(3, 128), scale_of(value)
    (gated,) = run(gate.KERNEL, "llmopt.gated_activation", {"x": x, "kind": "silu"}, [((1, 3, 64), FP16)])
    call = {"x": x, "scale": scale, "format": format, "gate": "silu"}
    found = run(rounding.KERNEL, ROUNDED, call, outputs(3, 64, format, scale))
    codes, scales = coded(gated, scale, format)
    assert same(found[0], codes)
    assert value is not None or torch.equal(found[1], scales)


NORMS: list[tuple[str, dict[str, Any]]] = [
    ("llmopt.rms_norm", {"eps": 1e-5, "offset": 0.0, "mul_in_fp32": False}),
    ("llmopt.add_rms_norm", {"eps": 1e-5, "offset": 1.0, "mul_in_fp32": True}),
    ("aten.layer_norm.default", {"eps": 1e-5, "normalized_shape": (100,)}),
    ("llmopt.add_layer_norm", {"eps": 1e-5}),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", STATIC[:2])
@pytest.mark.parametrize(("op", "more"), NORMS, ids=[op for op, _ in NORMS])
def test_a_norm(op: str, more: dict[str, Any], value: float | None, format: str) -> None:
    """The codes of what the norm alone makes."""
    x, scale, random = rows(5, 100), scale_of(value), torch.Generator().manual_seed(0)
    first = "input" if op == "aten.layer_norm.default" else "x"
    call = {first: x, "weight": torch.randn(100, generator=random).to(FP16), **more}
    call |= {"bias": torch.randn(100, generator=random).to(FP16)} if "layer" in op else {}
    call |= {"residual": torch.randn((1, 5, 100), generator=random).to(FP16)} if "add" in op else {}
    normed, *total = run(norm.KERNEL, op, call, [(x.shape, FP16)] * (2 if "add" in op else 1))
    joined = {**call, "op": op, "input_scale": scale, "round": format}
    made = outputs(5, 100, format, scale)
    made.insert(1, (x.shape, FP16)) if total else None
    found = run(norm.KERNEL, NORM_ROUNDED, joined, made)
    codes, scales = coded(normed, scale, format)
    assert same(found.pop(0), codes)
    assert not total or same(found.pop(0), total[0])
    assert value is not None or torch.equal(found[0], scales)


def test_a_scale_of_another_row_is_noticed() -> None:
    x = rows(3, 17)
    found = run(rounding.KERNEL, ROUNDED, {"x": x, "scale": None, "format": "int8"}, outputs(3, 17, "int8", None))
    codes, scales = coded(x.roll(1, 1), None, "int8")
    assert not same(found[0], codes)
    assert not torch.equal(found[1], scales)
