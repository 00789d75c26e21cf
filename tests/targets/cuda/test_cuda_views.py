"""Views as strides, against torch: every rule addresses the elements torch's view addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from targets.cuda.kernel import Strided
from targets.cuda.plan import dense
from targets.cuda.views import resolve_view

BASE = (2, 6, 4, 5)


def tensor(x: Strided, memory: torch.Tensor) -> torch.Tensor:
    return torch.as_strided(memory, x.shape, x.strides, x.offset)


def check(op: str, torch_view: Callable[[torch.Tensor], Any], *args: Any) -> None:
    memory = torch.arange(240)
    found = resolve_view(f"aten.{op}", {"self": dense("x", "int64", BASE), **{str(i): a for i, a in enumerate(args)}})
    expected = torch_view(memory.view(BASE))
    assert found is not None
    for a, b in zip(found, expected if isinstance(expected, tuple | list) else (expected,), strict=True):
        assert torch.equal(tensor(a, memory), b)


CASES: list[tuple[str, Callable[[torch.Tensor], Any], tuple[Any, ...]]] = [
    ("view.default", lambda x: x.view(12, -1), ((12, -1),)),
    ("reshape.default", lambda x: x.reshape(2, 3, 2, 20), ((2, 3, 2, 20),)),
    ("transpose.int", lambda x: x.transpose(1, -1), (1, -1)),
    ("permute.default", lambda x: x.permute(3, 1, 0, 2), ((3, 1, 0, 2),)),
    ("unsqueeze.default", lambda x: x.unsqueeze(-1), (-1,)),
    ("unsqueeze.default", lambda x: x.unsqueeze(1), (1,)),
    ("slice.Tensor", lambda x: x[:, 1:-1], (1, 1, -1)),
    ("slice.Tensor", lambda x: x[:, 0:9223372036854775807:2], (1, 0, 9223372036854775807, 2)),
    ("narrow.default", lambda x: x.narrow(2, 1, 2), (2, 1, 2)),
    ("select.int", lambda x: x.select(1, -2), (1, -2)),
    ("expand.default", lambda x: x.expand(3, 2, 6, 4, 5), ((3, -1, -1, -1, -1),)),
    ("split.Tensor", lambda x: x.split(4, 1), (4, 1)),
    ("split_with_sizes.default", lambda x: x.split((1, 3), -2), ((1, 3), -2)),
    ("chunk.default", lambda x: x.chunk(2, -1), (2, -1)),
    ("unflatten.int", lambda x: x.unflatten(1, (2, -1)), (1, (2, -1))),
    ("flatten.using_ints", lambda x: x.flatten(1, 2), (1, 2)),
    ("squeeze.dim", lambda x: x.squeeze(0), (0,)),
    ("contiguous.default", lambda x: x, ()),
]


@pytest.mark.parametrize(("op", "view", "args"), CASES)
def test_a_view_addresses_what_torch_addresses(
    op: str, view: Callable[[torch.Tensor], Any], args: tuple[Any, ...]
) -> None:
    check(op, view, *args)


@settings(max_examples=200, deadline=None)
@given(
    st.permutations(range(4)), st.sampled_from([(240,), (12, 20), (2, 6, 20), (48, 5), (2, 3, 2, 4, 5), (1, 240, 1)])
)
def test_reshape_of_a_permutation_agrees_with_torch(order: list[int], shape: tuple[int, ...]) -> None:
    memory = torch.arange(240)
    x = resolve_view("aten.permute.default", {"self": dense("x", "int64", BASE), "dims": tuple(order)})
    assert x is not None
    found = resolve_view("aten.reshape.default", {"self": x[0], "shape": shape})
    try:
        expected = memory.view(BASE).permute(order).view(shape)
    except RuntimeError:
        assert found is None
        return
    assert found is not None
    assert torch.equal(tensor(found[0], memory), expected)


def test_what_moves_data_is_no_view() -> None:
    x = resolve_view("aten.transpose.int", {"self": dense("x", "int64", BASE), "a": 0, "b": 1})
    assert x is not None
    for op in ("aten.clone.default", "aten.contiguous.default"):
        assert resolve_view(op, {"self": x[0]}) is None
    assert resolve_view("aten.add.Tensor", {"self": x[0], "other": x[0]}) is None
