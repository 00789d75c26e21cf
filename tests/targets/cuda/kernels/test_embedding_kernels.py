"""Rows of quantized tables against the reference's, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmopt.ir.ops  # noqa: F401 registers the dialect
from targets.cuda.kernels import embedding
from targets.cuda.pack import EMBEDDING, chunk_of, pack_codes
from tests.targets.cuda.kernels.harness import run

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
TAKE = embedding.KERNELS[1]
FORMS: list[dict[str, Any]] = [
    {"bits": 4, "group": 32},
    {"bits": 4, "group": 128, "zeros": True, "dtype": FP16},
    {"bits": 8, "group": 64, "zeros": True},
    {"bits": 8, "group": None},
    {"bits": 8, "group": None, "width": 65},
    {"format": "fp8_e4m3", "bits": 8, "group": None},
    {"format": "fp8_e4m3", "bits": 8, "group": 128, "shared": 4},
]


def table(
    rows: int = 12, width: int = 256, *, bits: int, group: int | None, format: str = "int", zeros: bool = False,
    shared: int = 1, dtype: torch.dtype = BF16,
) -> dict[str, Any]:  # fmt: skip
    """A quantized table with every code in it; ``group`` None: one scale a row."""
    random = torch.Generator().manual_seed(rows + width)
    codes = torch.randint(0, 2**bits, (rows, width), generator=random, dtype=torch.uint8)
    if format == "fp8_e4m3":
        codes = torch.where(codes & 127 == 127, 0, codes).view(FP8)
    tables = (rows // shared, width // (group or width))
    return {
        "codes": codes, "scales": torch.rand(tables, generator=random).to(dtype),
        "zeros": torch.randint(0, 2**bits, tables, generator=random, dtype=torch.uint8) if zeros else None,
        "indices": torch.tensor([[0, 5, 11, 5]]), "format": format, "bits": bits, "block_n": shared,
        "block_k": group or width, "dtype": dtype,
    }  # fmt: skip


def compute(v: dict[str, Any], packed: Tensor | None = None) -> Tensor:
    """The kernel over the packed table."""
    codes, width = v["codes"].view(torch.uint8).numpy(), v["codes"].shape[1]
    chunk = chunk_of(v["bits"], v["block_k"], width)
    stored = torch.from_numpy(pack_codes(codes, v["bits"], chunk, v["format"])) if packed is None else packed
    tables = {n: None if v[n] is None else v[n].T.contiguous() for n in ("scales", "zeros")}
    given = {**v, "codes": stored, **tables}
    (out,) = run(TAKE, EMBEDDING, given, [((*v["indices"].shape, width), v["dtype"])])
    return out


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_of_codes(form: dict[str, Any]) -> None:
    v = table(**form)
    assert torch.equal(compute(v), torch.ops.llmopt.embedding_q(**v))


def test_a_table_that_lies_as_codes_of_activations_do() -> None:
    """That of a tied LM head whose input is rounded."""
    v = table(bits=8, group=None)
    expected = torch.ops.llmopt.embedding_q(**v)
    assert torch.equal(compute(v, (v["codes"] ^ 128).view(torch.int8)), expected)
    v = table(bits=8, group=None, format="fp8_e4m3")
    assert torch.equal(compute(v, v["codes"]), torch.ops.llmopt.embedding_q(**v))


def test_an_index_outside_the_table_reads_row_0() -> None:
    v = table(bits=4, group=32) | {"indices": torch.tensor([[12, -1, 1]])}
    expected = torch.ops.llmopt.embedding_q(**{**v, "indices": torch.tensor([[0, 0, 1]])})
    assert torch.equal(compute(v), expected)


@pytest.mark.parametrize("name", ["codes", "scales", "zeros"])
@pytest.mark.parametrize("axis", [0, 1])
def test_another_row_or_group_is_noticed(name: str, axis: int) -> None:
    v = table(bits=4, group=32, zeros=True)
    assert not torch.equal(compute(v), torch.ops.llmopt.embedding_q(**{**v, name: v[name].roll(1, axis)}))
