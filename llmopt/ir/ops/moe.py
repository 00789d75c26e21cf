"""Mixture of experts: the experts' computation, routing stays in the graph."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.ir.ops.activation import ACTIVATIONS


def gate(x: Tensor, activation: str) -> Tensor:
    """Gated activation of an expert's (rows, 2I). ``swiglu_oai`` is gpt-oss': interleaved, clamped at 7, (up + 1)."""
    if activation == "swiglu_oai":
        glu, up = x[..., 0::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * glu * torch.sigmoid(glu * 1.702)
    glu, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[activation](glu) * up


@torch.library.custom_op("llmopt::moe_experts", mutates_args=())
def moe_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Sum over the chosen experts e of ``weight * down_e(act(gate_up_e(x)))``.

    x (T, C); index (T, k) int64; weight (T, k); gate_up (E, 2I, C); down (E, C, I); biases (E, 2I), (E, C).
    Result (T, C), x's dtype.
    """
    out = torch.zeros_like(x)
    for e in torch.bincount(index.flatten()).nonzero().flatten().tolist():
        row, choice = torch.where(index == e)
        hidden = F.linear(x[row], gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
        value = F.linear(gate(hidden, activation), down[e], None if down_bias is None else down_bias[e])
        out.index_add_(0, row, (value * weight[row, choice, None]).to(x.dtype))
    return out


@moe_experts.register_fake
def _(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    return torch.empty_like(x)
