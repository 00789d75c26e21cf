"""Mixture of experts: the experts' computation, routing stays in the graph."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.ir.ops.activation import ACTIVATIONS
from llmopt.ir.ops.linear import dequantize


def gate(x: Tensor, activation: str) -> Tensor:
    """Gated activation of an expert's (rows, 2I). ``swiglu_oai`` is gpt-oss': interleaved, clamped at 7, (up + 1)."""
    if activation == "swiglu_oai":
        glu, up = x[..., 0::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * glu * torch.sigmoid(glu * 1.702)
    glu, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[activation](glu) * up


def mix(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Callable[[int], Tensor],
    down: Callable[[int], Tensor],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """The experts' sum of ``moe_experts``; ``gate_up`` and ``down`` give an expert's matrix."""
    out = torch.zeros_like(x)
    for e in torch.bincount(index.flatten()).nonzero().flatten().tolist():
        row, choice = torch.where(index == e)
        hidden = F.linear(x[row], gate_up(e), None if gate_up_bias is None else gate_up_bias[e])
        value = F.linear(gate(hidden, activation), down(e), None if down_bias is None else down_bias[e])
        out.index_add_(0, row, (value * weight[row, choice, None]).to(x.dtype))
    return out


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
    return mix(x, index, weight, gate_up.__getitem__, down.__getitem__, gate_up_bias, down_bias, activation)


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


@torch.library.custom_op("llmopt::moe_experts_q", mutates_args=())
def moe_experts_q(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down_codes: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    format: str,
    bits: int,
    block_n: int,
    gate_up_block_k: int,
    down_block_k: int,
) -> Tensor:
    """``moe_experts`` over matrices quantized as in ``linear_q``, each expert by itself.

    Codes (E, 2I, C) and (E, C, I); scales and zeros (E, 2I/block_n, C/gate_up_block_k) and
    (E, C/block_n, I/down_block_k).
    """

    def expert(codes: Tensor, scales: Tensor, zeros: Tensor | None, block_k: int) -> Callable[[int], Tensor]:
        def matrix(e: int) -> Tensor:
            zero = None if zeros is None else zeros[e]
            return dequantize(codes[e], scales[e], zero, None, format, bits, block_n, block_k).to(x.dtype)

        return matrix

    gate_up = expert(gate_up_codes, gate_up_scales, gate_up_zeros, gate_up_block_k)
    down = expert(down_codes, down_scales, down_zeros, down_block_k)
    return mix(x, index, weight, gate_up, down, gate_up_bias, down_bias, activation)


@moe_experts_q.register_fake
def _(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down_codes: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    format: str,
    bits: int,
    block_n: int,
    gate_up_block_k: int,
    down_block_k: int,
) -> Tensor:
    return torch.empty_like(x)
