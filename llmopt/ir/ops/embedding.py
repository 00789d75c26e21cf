"""Embedding tables over quantized weights (plain ones stay aten.embedding)."""

import torch
from torch import Tensor

from llmopt.ir.ops.linear import dequantize


@torch.library.custom_op("llmopt::embedding_q", mutates_args=())
def embedding_q(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    indices: Tensor,
    format: str,
    bits: int,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``indices`` (...) of the table that codes (V, K), scales and zeros stand for, as in ``linear_q``.

    Result (..., K) in ``dtype``.
    """
    rows = indices.flatten()
    blocks = rows // block_n
    zero = None if zeros is None else zeros[blocks]
    values = dequantize(codes[rows], scales[blocks], zero, None, format, bits, 1, block_k)
    return values.to(dtype).reshape(*indices.shape, codes.shape[1])


@embedding_q.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    indices: Tensor,
    format: str,
    bits: int,
    block_n: int,
    block_k: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((*indices.shape, codes.shape[1]), dtype=dtype)
