"""Rounding of activations to the integers or FP8 values a matrix multiplication would take them as."""

import torch
from torch import Tensor

LIMITS = {"int8": 127.0, "fp8_e4m3": 448.0}
"""Largest magnitude of each format's codes."""


@torch.library.custom_op("llmopt::round_activations", mutates_args=())
def round_activations(x: Tensor, scale: Tensor | None, format: str) -> Tensor:
    """``code * scale``, in x's dtype: what a kernel that multiplies codes and scales the sums computes with.

    x (..., K). ``format``: int8 (ties to even) or fp8_e4m3. ``scale`` (1,) fp32 is static, for all rows; None: each row
    has its own, max|x| / LIMITS[format]. Codes are clamped to ± the limit.
    """
    limit = LIMITS[format]
    values = x.float()
    used = values.abs().amax(-1, keepdim=True) / limit if scale is None else scale
    used = torch.where(used == 0, 1.0, used)
    codes = (values / used).clamp(-limit, limit)
    codes = codes.round() if format == "int8" else codes.to(torch.float8_e4m3fn).float()
    return (codes * used).to(x.dtype)


@round_activations.register_fake
def _(x: Tensor, scale: Tensor | None, format: str) -> Tensor:
    return torch.empty_like(x)
