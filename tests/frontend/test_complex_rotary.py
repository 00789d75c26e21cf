"""Rotations by complex tables: which functions are raised to llmopt.rope, and which are left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmopt.frontend.probe import probe_complex_rope

Turn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def by(turn: Callable[[Tensor, Tensor], Tensor], axis: int) -> Turn:
    """Queries and keys, heads in an axis, turned by a table as complex numbers are multiplied by ``turn``."""

    def apply(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
        table = freqs_cis.unsqueeze(axis)
        pairs = [torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) for x in (xq, xk)]
        q, k = (torch.view_as_real(turn(x, table)).flatten(3) for x in pairs)
        return q, k

    return apply


@pytest.mark.parametrize("axis", [1, 2])
def test_a_product_with_the_table_is_raised_where_its_heads_are(axis: int) -> None:
    rotation = by(lambda x, table: x * table, axis)
    form = probe_complex_rope(rotation, axis)
    assert form is not None
    assert (form.interleaved, form.sorts, form.tensors) == (True, False, 2)
    assert probe_complex_rope(rotation, 3 - axis) is None


@pytest.mark.parametrize("turn", [lambda x, table: x * table.conj(), lambda x, table: x + table], ids=["back", "sum"])
def test_anything_else_is_left_alone(turn: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert probe_complex_rope(by(turn, 1), 1) is None
