"""Every generic op the target emits gives torch's result, at sizes other than those it was traced with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmopt.errors import TargetError
from tests.targets.onnxruntime.build import run, trace

Function = Callable[[torch.Tensor], Any]
FLOATS: dict[str, Function] = {
    "unary": lambda x: torch.tanh(x).exp() + x.abs().sqrt() - x.sin() * x.cos() + torch.sigmoid(-x) + x.neg().relu(),
    "rounding": lambda x: x.floor() + x.ceil() * 3 + x.sign() * 7 + x.round(),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1) + (x.abs() + 1).log() + (x.abs() + 1).reciprocal() + torch.erf(x),
    "alpha": lambda x: torch.add(x, x, alpha=3) - torch.sub(x, 2, alpha=5) + torch.rsub(x, 1.5),
    "pow": lambda x: x.pow(2) + x.abs().pow(1.5) + torch.pow(2.0, x),
    "extremes": lambda x: torch.maximum(x, -x) + torch.minimum(x, x * 2),
    "clamp": lambda x: x.clamp(-0.5, 0.7) + x.clamp_min(0.1) + x.clamp(max=0.3),
    "compare": lambda x: torch.where((x > 0.1) & (x <= 1) | (x != x) | ~(x >= -1), x, -x),
    "comparisons": lambda x: (x < 0, x == x, x.ge(0.5), torch.logical_and(x > 0, x < 1), (x > 0).logical_not()),
    "masked": lambda x: x.masked_fill(x > 0, -2.5) * (x > 1).float(),
    "division": lambda x: x / 3 + torch.div(x, 0.7, rounding_mode="floor") + torch.div(x, 0.7, rounding_mode="trunc"),
    "remainder": lambda x: torch.remainder(x, 0.7) + torch.floor_divide(x, 0.3),
    "silu": lambda x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh"),
    "reductions": lambda x: x.sum(-1, keepdim=True) + x.mean((1, 2), keepdim=True) + x.amax(2, keepdim=True),
    "reduced axes": lambda x: (x.sum(1), x.mean(-1), x.amin(-1), x.sum(), (x > 0).any(-1), (x > 5).all(1)),
    "softmax": lambda x: (x.softmax(-1), torch.log_softmax(x, 1)),
    "topk": lambda x: x.topk(3, dim=-1)[0],
    "topk indices": lambda x: x.topk(3, dim=-1)[1],
    "sort": lambda x: x.sort(-1, descending=True)[0] + x.sort(-1)[0],
    "argmax": lambda x: (x.argmax(-1), x.argmin(1, keepdim=True), *x.max(-1), *x.min(1, keepdim=True)),
    "cumsum": lambda x: x.cumsum(1),
    "views": lambda x: x.reshape(x.shape[1], 12).unsqueeze(0).transpose(1, 2).permute(2, 0, 1).squeeze(1),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1) * 2,
    "flatten": lambda x: x.flatten(1).unflatten(1, (-1, 4)),
    "slices": lambda x: (x[..., 1:7], x[..., ::2], x[:, -1:], x[..., -3:], x[:, :, 5], x[:, 1:]),
    "splits": lambda x: torch.cat((*x.split(5, -1), *x.chunk(3, -1), *x.split([2, 10], -1)), -1),
    "unbind": lambda x: torch.stack(x.view(1, -1, 3, 4).unbind(2), -1),
    "cat": lambda x: torch.cat((x, x * 2), 1) + torch.stack((x, x), 1).flatten(1, 2),
    "repeat": lambda x: x.repeat(2, 1, 3).repeat_interleave(2, 1),
    "index_select": lambda x: x.index_select(1, torch.arange(x.shape[1])) + x.index_select(2, (x[0, 0] > 9).long()),
    "gather": lambda x: x.gather(-1, x.argsort(-1, descending=True)),
    "scatter": lambda x: torch.zeros_like(x).scatter(-1, x.topk(2, -1)[1], 1.0),
    "scatter source": lambda x: x.scatter(-1, x.topk(2, -1)[1], x.topk(2, -1)[0] * 5),
    "scatter_add": lambda x: x.scatter_add(-1, x.topk(2, -1)[1], x.topk(2, -1)[0]),
    "creation": lambda x: x + torch.full((1, x.shape[1], 1), 2.0) + torch.ones_like(x) - x.new_zeros(12),
    "arange": lambda x: x * torch.arange(x.shape[1])[None, :, None] + torch.arange(2, 26, 2, dtype=torch.float32),
    "casts": lambda x: x.to(torch.int64).float() + (x > 0).to(torch.float32) + x.half().float().clone(),
    "bits": lambda x: ((x * 8).long() & 3) ^ 1,
    "integers": lambda x: ((x * 9).long() // 4, (x * 9).long() % 4, (x * 9).long() * 2 + 1),
    "matmul": lambda x: x @ x.transpose(1, 2) + torch.bmm(x, x.transpose(1, 2)),
    "addmm": lambda x: torch.addmm(x[0], x[0], x[0].t() @ x[0], beta=0.5, alpha=2.0),
    "linear": lambda x: F.linear(x, x[0, :1], None) + F.linear(x, x[0, :1], x[0, 0, :1]),
    "index pair": lambda x: x[0][torch.arange(x.shape[1]), x[0].argmax(-1)],
    "layer norm": lambda x: F.layer_norm(x, (12,), None, None, 1e-5),
    "scalar promotion": lambda x: (x > 0).long() * 0.5 + (x > 0) * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_matches_torch(name: str) -> None:
    torch.manual_seed(0)
    program = trace(FLOATS[name], torch.randn(1, 5, 12))
    x = torch.randn(1, 7, 12) * 2
    expected = FLOATS[name](x)
    for found, wanted in zip(run(program, x), expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert found.dtype == wanted.numpy().dtype
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-5, atol=2e-5)


def test_a_wrong_rule_is_caught() -> None:
    """The comparison above notices a program that computes something else."""
    x = torch.randn(1, 7, 12)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(run(trace(torch.sin, x), x)[0], x.cos().numpy(), rtol=2e-5, atol=2e-5)


REFUSED: dict[str, Function] = {
    "fft_r2c": lambda x: torch.fft.rfft(x),
    "argmax": lambda x: x.argmax(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name: str) -> None:
    x = torch.randn(1, 7, 12)
    with pytest.raises(TargetError, match=name):
        run(trace(REFUSED[name], x), x)
