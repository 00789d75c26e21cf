"""Experts over int4, int8, FP8 and MXFP4 weights: even, skewed and padded routing, both gate layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmopt.ir.ops  # noqa: F401 registers the dialect
from targets.cuda.kernels import moe_q
from targets.cuda.pack import EXPERTS, STACKS, chunk_of, pack_codes
from tests.targets.cuda.kernels.harness import close, run

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
INDEX = torch.tensor([[1, 3], [3, 0], [4, 1]])
FORMS: list[dict[str, Any]] = [
    {"bits": 4, "group": 32},
    {"bits": 4, "group": 64, "zeros": True},
    {"bits": 4, "group": 64, "dtype": FP16, "bias": True},
    {"bits": 8, "group": 32, "zeros": True},
    {"bits": 8, "group": None},
    {"format": "fp8_e4m3", "bits": 8, "group": None, "shared": 16},
    {"format": "fp8_e4m3", "bits": 8, "group": 64, "shared": 16},
    {"format": "mxfp4", "bits": 4, "group": 32, "bias": True},
    {"format": "mxfp4", "bits": 4, "group": 32, "dtype": FP16},
]


def operands(
    index: Tensor, experts: int = 5, c: int = 128, width: int = 64, *, bits: int = 4, group: int | None = 32,
    format: str = "int", zeros: bool = False, shared: int = 1, bias: bool = False, dtype: torch.dtype = BF16,
) -> dict[str, Any]:  # fmt: skip
    """A call with its codes unpacked; ``group`` None: one scale a row."""
    random = torch.Generator().manual_seed(experts + c + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def integers(*shape: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=random, dtype=torch.uint8)

    v: dict[str, Any] = {"x": draw(len(index), c), "index": index, "weight": draw(*index.shape).softmax(-1)}
    for stack, n, k in (("gate_up", 2 * width, c), ("down", c, width)):
        block = group or k
        tables = (experts, n // shared, k // block)
        v[f"{stack}_codes"] = draw(experts, n, k).to(FP8) if format == "fp8_e4m3" else integers(experts, n, k)
        v[f"{stack}_scales"] = (torch.rand(tables, generator=random) / 2**bits + 0.01).to(dtype)
        v[f"{stack}_zeros"] = integers(*tables) if zeros else None
        v[f"{stack}_bias"] = draw(experts, n) if bias else None
        v[f"{stack}_block_k"] = block
    return v | {"format": format, "bits": bits, "block_n": shared, "activation": "silu"}


def compute(v: dict[str, Any]) -> Tensor:
    """The kernels over packed weights."""
    given = dict(v)
    for stack in STACKS:
        codes, block = v[f"{stack}_codes"], v[f"{stack}_block_k"]
        packed = pack_codes(
            codes.view(torch.uint8).numpy(), v["bits"], chunk_of(v["bits"], block, codes.shape[-1]), v["format"]
        )
        given[f"{stack}_codes"] = torch.from_numpy(packed)
        for name in (f"{stack}_scales", f"{stack}_zeros"):
            given[name] = None if v[name] is None else v[name].transpose(1, 2).contiguous()
    (out,) = run(moe_q.KERNEL, EXPERTS, given, [(tuple(v["x"].shape), v["x"].dtype)])
    return out


def exact(v: dict[str, Any]) -> Tensor:
    """The op in fp32 over the rows that choose experts."""
    wide = {n: x.float() if isinstance(x, Tensor) and x.dtype in (BF16, FP16) else x for n, x in v.items()}
    return torch.ops.llmopt.moe_experts_q(**wide)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_formats(form: dict[str, Any]) -> None:
    v = operands(INDEX, **form)
    close(compute(v), exact(v), 3)


def test_interleaved_gates_with_biases() -> None:
    v = operands(INDEX, format="mxfp4", bias=True) | {"activation": "swiglu_oai"}
    close(compute(v), exact(v), 3)


def test_int8_rows_that_no_step_divides() -> None:
    v = operands(torch.tensor([[0], [2], [1]]), 3, 72, 40, bits=8, group=None, zeros=True)
    close(compute(v), exact(v), 3)


def test_skewed_and_empty_routing() -> None:
    v = operands(torch.full((80, 1), 2), 4)
    close(compute(v), exact(v), 3)


def test_padding_rows_are_left_out() -> None:
    v = operands(torch.tensor([[1, 0], [-5, 7 << 40], [2, 1]]), 3)
    live = torch.tensor([True, False, True])
    close(compute(v)[live], exact({**v, **{n: v[n][live] for n in ("x", "index", "weight")}}), 3)


@pytest.mark.parametrize("name", ["gate_up_scales", "down_scales", "gate_up_zeros", "down_zeros", "down_codes"])
@pytest.mark.parametrize("axis", [0, 2])
def test_a_table_of_another_expert_or_group_is_noticed(name: str, axis: int) -> None:
    v = operands(INDEX, zeros=True)
    out = compute(v)
    with pytest.raises(AssertionError, match="error"):
        close(out, exact({**v, name: v[name].roll(1, axis)}), 3)
