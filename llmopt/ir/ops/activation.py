"""Activations with a gate."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
}


@torch.library.custom_op("llmopt::gated_activation", mutates_args=())
def gated_activation(x: Tensor, kind: str) -> Tensor:
    """``act(x[..., :I]) * x[..., I:]`` for x (..., 2I); result (..., I), x's dtype."""
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[kind](gate) * up


@gated_activation.register_fake
def _(x: Tensor, kind: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
