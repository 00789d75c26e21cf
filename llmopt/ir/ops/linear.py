"""Linear layers over quantized weights (plain ones stay aten.linear)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor | None,
    format: str,
    bits: int,
    block_n: int,
    block_k: int,
) -> Tensor:
    """fp32 values of a quantized matrix: ``(code - zero) * scale``.

    codes (N, K); scales and zeros (N / block_n, K / block_k).
    format ``int``: uint8 codes in [0, 2^bits); zero defaults to 2^(bits-1). ``fp8_e4m3`` and ``mxfp4`` (E2M1 codes)
    have no zero. g_idx (K,) names each column's scale column, else it is k // block_k.
    """
    n, k = codes.shape

    def spread(x: Tensor) -> Tensor:
        """A (N / block_n, K / block_k) table, to be broadcast over ``blocks``."""
        return x.float()[:, None, :, None] if g_idx is None else x.float()[:, None, g_idx.long(), None]

    columns = (k // block_k, block_k) if g_idx is None else (k, 1)
    blocks, scale = codes.view(n // block_n, block_n, *columns), spread(scales)
    if format == "int":
        zero = spread(zeros) if zeros is not None else float(1 << (bits - 1))
        values = (blocks.float() - zero) * scale
    elif format == "mxfp4":
        e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)
        values = e2m1[(blocks & 7).long()] * torch.where(blocks >= 8, -1.0, 1.0) * scale
    else:
        values = blocks.float() * scale
    return values.view(n, k)


@torch.library.custom_op("llmopt::linear_q", mutates_args=())
def linear_q(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    g_idx: Tensor | None,
    format: str,
    bits: int,
    block_n: int,
    block_k: int,
) -> Tensor:
    """``x @ dequantize(...).T + bias``: x (..., K), codes (N, K), bias (N,); result (..., N) in x's dtype."""
    weight = dequantize(codes, scales, zeros, g_idx, format, bits, block_n, block_k)
    return F.linear(x, weight.to(x.dtype), bias)


@linear_q.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    g_idx: Tensor | None,
    format: str,
    bits: int,
    block_n: int,
    block_k: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
