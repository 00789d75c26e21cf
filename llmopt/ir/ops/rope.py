"""Rotary position embedding: the cos/sin table of a step and its application."""

import torch
from torch import Tensor


@torch.library.custom_op("llmopt::rotary_table", mutates_args=())
def rotary_table(
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    inv_freq_long: Tensor | None,
    scale_long: float,
    switch: int,
    lengths: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """cos and sin (1, T, F) of ``positions (1, T) * inv_freq (F,)`` times ``scale``, in ``dtype``.

    With ``inv_freq_long`` (longrope), rows whose sequence length ``lengths (1, T)`` exceeds ``switch`` use the
    long table and ``scale_long``; ``lengths`` None means one sequence, of length max(positions) + 1.
    """
    angles = positions[..., None].float() * inv_freq.float()
    cos, sin = angles.cos() * scale, angles.sin() * scale
    if inv_freq_long is not None:
        if lengths is None:
            lengths = (positions.max() + 1).expand_as(positions)
        long = positions[..., None].float() * inv_freq_long.float()
        use_long = (lengths > switch)[..., None]
        cos = torch.where(use_long, long.cos() * scale_long, cos)
        sin = torch.where(use_long, long.sin() * scale_long, sin)
    return cos.to(dtype), sin.to(dtype)


@rotary_table.register_fake
def _(
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    inv_freq_long: Tensor | None,
    scale_long: float,
    switch: int,
    lengths: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, inv_freq.shape[0])
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


@torch.library.custom_op("llmopt::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first 2F dims of x (1, H, T, D) by cos, sin (1, T, F); the rest passes through.

    Pairs are (i, i + F), or (2i, 2i + 1) when ``interleaved``. fp32 inside, x's dtype out.
    """
    width = 2 * cos.shape[-1]
    c, s = cos.float()[:, None], sin.float()[:, None]
    part = x[..., :width].float()
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        rotated = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
    else:
        a, b = part.chunk(2, dim=-1)
        rotated = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., width:]), dim=-1)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)
