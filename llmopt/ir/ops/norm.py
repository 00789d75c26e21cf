"""Normalizations, alone and fused with the residual addition before them."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("llmopt::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, mul_in_fp32: bool) -> Tensor:
    """RMSNorm over the last axis: ``x / sqrt(mean(x^2) + eps) * (offset + weight)``, statistics in fp32.

    x (..., C); weight (C,) or None; ``offset`` is 1 for Gemma. ``mul_in_fp32`` multiplies before the cast
    back to x's dtype (OLMo2, Gemma) instead of after it (Llama).
    """
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if mul_in_fp32:
        return (normed * (weight.float() + offset)).to(x.dtype)
    return normed.to(x.dtype) * (weight + offset)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float, mul_in_fp32: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("llmopt::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, mul_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """``s = residual + x``; returns (rms_norm(s), s). Shapes as rms_norm."""
    total = residual + x
    return rms_norm(total, weight, eps, offset, mul_in_fp32), total


@add_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, mul_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("llmopt::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``s = residual + x``; returns (layer_norm(s), s) over the last axis C; weight, bias (C,) or None."""
    total = residual + x
    return F.layer_norm(total, (total.shape[-1],), weight, bias, eps), total


@add_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
