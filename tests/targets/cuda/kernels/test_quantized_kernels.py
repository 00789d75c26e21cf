"""Linears over int4, int8 and FP8 weights, alone and joined with gate and residual, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.ir.ops.linear import dequantize
from targets.cuda.fusion import LINEAR_Q
from targets.cuda.kernel import Kernel
from targets.cuda.kernels import gemm_q, gemv_q
from targets.cuda.pack import chunk_of, pack_codes
from targets.cuda.tuning import linear_form, linear_key, quantized_form
from tests.targets.cuda.kernels.harness import close, run
from tests.targets.cuda.kernels.test_fused_linear_kernels import ACTIVATIONS, BF16, FP16


def operands(
    m: int, n: int, k: int, bits: int = 4, group: int = 32, *, zeros: bool = False, dtype: torch.dtype = BF16,
    bias: bool = False, gate: str | None = None, residual: bool = False,
    fp8: bool = False, shared: int = 1, plain: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """x (1, m, k), unpacked codes (n or 2n, k), scales and zeros (n or 2n over shared, k / group), and what the call
    joins; ``plain``: codes that lie as those of activations do."""
    random = torch.Generator().manual_seed(m * 7919 + n * 31 + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    rows = n if gate is None else 2 * n
    return {
        "x": 3 * draw(1, m, k), "codes": draw(rows, k).to(FP8) if fp8 else integers(random, 2**bits, rows, k),
        "scales": (torch.rand((rows // shared, k // group), generator=random) / 2**bits + 0.01).to(dtype),
        "zeros": integers(random, 2**bits, rows, k // group) if zeros else None, "bias": draw(rows) if bias else None,
        "g_idx": None, "format": "fp8_e4m3" if fp8 else "int", "bits": bits, "block_n": shared, "block_k": group,
        "plain": plain,
        "gate": gate,
        "residual": draw(1, m, n) if residual else None,
    }  # fmt: skip


def integers(random: torch.Generator, top: int, *shape: int) -> Tensor:
    return torch.randint(0, top, shape, generator=random, dtype=torch.uint8)


def exact(v: dict[str, Any]) -> Tensor:
    """The call in float64."""
    x = v["x"].double()
    weight = dequantize(*(v[name] for name in QUANTIZATION)).double()
    out = torch.nn.functional.linear(x, weight)
    if v["bias"] is not None:
        out = out + v["bias"].double()
    if v["gate"] is not None:
        a, b = out.chunk(2, dim=-1)
        out = ACTIVATIONS[v["gate"]](a) * b
    return out if v["residual"] is None else out + v["residual"].double()


def compute(v: dict[str, Any], config: dict[str, int] | None = None, kernel: Kernel = gemm_q.KERNEL) -> Tensor:
    """A kernel over packed weights, with a configuration as if it had been tuned."""
    (m, k), rows, bits, group = v["x"].shape[1:], v["codes"].shape[0], v["bits"], v["block_k"]
    if v["plain"]:
        stored = v["codes"] if v["format"] != "int" else (v["codes"] ^ 128).view(torch.int8)
    else:
        codes = v["codes"].view(torch.uint8).numpy()
        stored = torch.from_numpy(pack_codes(codes, bits, chunk_of(bits, group, k), v["format"]))
    tables = {name: v[name].T.contiguous() for name in ("scales", "zeros") if v[name] is not None}
    key = linear_key(quantized_form(v, k), m, rows, k, linear_form(v))
    tuning = {kernel.name: {key: config}} if config else None
    n = rows if v["gate"] is None else rows // 2
    given = {**v, "codes": stored, **tables}
    (out,) = run(kernel, LINEAR_Q, given, [((1, m, n), v["x"].dtype)], tuning=tuning)
    return out


FP8 = torch.float8_e4m3fn
QUANTIZATION = ("codes", "scales", "zeros", "g_idx", "format", "bits", "block_n", "block_k")
FORMATS: list[dict[str, Any]] = [
    {"bits": 4, "group": 32},
    {"bits": 4, "group": 64, "zeros": True},
    {"bits": 4, "group": 128, "zeros": True, "dtype": FP16},
    {"bits": 4, "group": 256},
    {"bits": 8, "group": 32, "zeros": True},
    {"bits": 8, "group": 128},
]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 17), (17, 65)])
def test_groups(m: int, n: int, form: dict[str, Any]) -> None:
    v = operands(m, n, 256, **form)
    close(compute(v), exact(v))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (2, 33, 65), (5, 9, 300)])
def test_int8_channels_of_any_length(m: int, n: int, k: int, zeros: bool) -> None:
    v = operands(m, n, k, 8, k, zeros=zeros)
    close(compute(v), exact(v))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("form", [{"group": 128, "shared": 16}, {"group": 64, "dtype": FP16}, {"group": 256}], ids=str)
def test_fp8(form: dict[str, Any], plain: bool) -> None:
    v = operands(3, 48, 256, 8, fp8=True, plain=plain, **form)
    close(compute(v), exact(v))


@pytest.mark.parametrize("plain", [False, True])
def test_fp8_tensors_of_any_length(plain: bool) -> None:
    v = operands(2, 35, 65, 8, 65, fp8=True, shared=70, gate="silu", residual=True, plain=plain)
    close(compute(v), exact(v))


def test_int8_as_activations_lie() -> None:
    v = operands(3, 17, 256, 8, 128, plain=True)
    close(compute(v), exact(v))


def test_int4_channels() -> None:
    v = operands(3, 9, 96, 4, 96, zeros=True)
    close(compute(v), exact(v))


PARTS: list[dict[str, Any]] = [
    {"residual": True, "bias": True},
    {"gate": "silu", "bias": True, "zeros": True},
    {"gate": "gelu_tanh"},
    {"gate": "relu", "residual": True},
]


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts))
def test_joined(parts: dict[str, Any], bits: int, split: int) -> None:
    v = operands(3, 70, 256, bits, 64, **parts)
    close(compute(v, {"BM": 16, "BN": 128, "SPLIT": split, "AHEAD": 0, "warps": 4, "stages": 3}), exact(v))


ONE_ROW: list[dict[str, Any]] = [
    {"bits": 4, "group": 32},
    {"bits": 4, "group": 96, "zeros": True},
    {"bits": 4, "group": 64, "zeros": True},
    {"bits": 4, "group": 128},
    {"bits": 4, "group": 384},
    {"bits": 8, "group": 32, "zeros": True},
    {"bits": 8, "group": 128},
    {"bits": 8, "group": 384, "zeros": True},
]


@pytest.mark.parametrize("config", [None, {"rows": 4, "block": 16, "warps": 1}], ids=["modelled", "steps"])
@pytest.mark.parametrize("form", ONE_ROW, ids=str)
def test_one_row_by_a_kernel_of_its_own(form: dict[str, Any], config: dict[str, int] | None) -> None:
    v = operands(1, 17, 384, **form)
    close(compute(v, config, gemv_q.KERNEL), exact(v))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(parts))
def test_one_row_joined(parts: dict[str, Any], bits: int) -> None:
    v = operands(1, 18, 256, bits, 64, **parts)
    close(compute(v, {"rows": 2, "block": 32, "warps": 1}, gemv_q.KERNEL), exact(v))


def test_what_one_row_of_its_own_refuses() -> None:
    for v in (operands(2, 16, 128), operands(1, 16, 128, 8, 128, fp8=True), operands(1, 16, 128, dtype=FP16)):
        with pytest.raises(AssertionError):
            compute(v, None, gemv_q.KERNEL)


@pytest.mark.parametrize("scaled", [0, 1])
def test_many_tiles(scaled: int) -> None:
    config = {"BM": 16, "BN": 64, "SPLIT": 2, "AHEAD": 128, "SCALED": scaled, "warps": 4, "stages": 3}
    for bits, group, zeros in ((4, 64, True), (8, 128, False), (8, 128, True)):
        v = operands(40, 70, 128, bits, group, zeros=zeros)
        close(compute(v, config), exact(v))


@pytest.mark.parametrize("wrong", ["zeros", "scales", "codes"])
def test_an_operand_of_another_group_is_noticed(wrong: str) -> None:
    v = operands(2, 17, 256, 4, 64, zeros=True)
    out = compute(v)
    v[wrong] = v[wrong].roll(1, -1)
    with pytest.raises(AssertionError, match="error"):
        close(out, exact(v))


def test_fp8_codes_packed_as_integers_are_noticed() -> None:
    v = operands(3, 48, 256, 8, 256, fp8=True)
    wrong = {**v, "codes": v["codes"].view(torch.uint8) ^ 128}
    with pytest.raises(AssertionError, match="error"):
        close(compute({**wrong, "codes": wrong["codes"].view(FP8)}), exact(v))
