"""KV state writes: functional in the IR, aliased in place by lowering; and the rounding of quantized states."""

import torch
from torch import Tensor

from llmopt.ir.ops.rope import rope
from llmopt.ir.ops.rounding import LIMITS

CODES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
"""dtype of a quantized state by its format."""
LARGEST = {CODES[name]: limit for name, limit in LIMITS.items()}


def encode(rows_HTD: Tensor, scale_H: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of rows: the nearest to ``rows / scale`` of the head, ties to even; what is beyond the range saturates."""
    limit = LARGEST[dtype]
    values = (rows_HTD.float() / scale_H[:, None, None]).clamp(-limit, limit)
    return (values.round() if dtype == torch.int8 else values).to(dtype)


def decode(codes_HTD: Tensor, scale_H: Tensor) -> Tensor:
    """``codes * scale`` of their head, fp32."""
    return codes_HTD.float() * scale_H[:, None, None]


@torch.library.custom_op("llmopt::round_kv", mutates_args=())
def round_kv(x: Tensor, scale: Tensor, format: str) -> Tensor:
    """Keys or values x (1, Hk, T, D) as a quantized state gives them back, fp32; scale (Hk,) fp32.

    ``format``: int8 or fp8_e4m3. What quantize_kv puts before ``attention`` and rewrite_kv_cache turns into codes.
    """
    return decode(encode(x[0], scale, CODES[format]), scale)[None]


@round_kv.register_fake
def _(x: Tensor, scale: Tensor, format: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def scatter_rows(state: Tensor, rows_HTD: Tensor, slot_mapping: Tensor, scale_H: Tensor | None) -> None:
    """In place: state (B, Hk, S, D) at flat slot ``block * S + offset`` takes the row, as codes where there is a
    scale."""
    size = state.shape[2]
    rows = rows_HTD.to(state.dtype) if scale_H is None else encode(rows_HTD, scale_H, state.dtype)
    state[slot_mapping // size, :, slot_mapping % size] = rows.transpose(0, 1)


@torch.library.custom_op("llmopt::kv_write", mutates_args=())
def kv_write(
    k_state: Tensor,
    v_state: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write rows k (1, Hk, T, D), v (1, Hk, T, Dv) at slot_mapping (T,) int64; returns the new states.

    States are (B, Hk, S, D) and (B, Hk, S, Dv); a slot is ``block * S + offset``. With scales (Hk,) fp32 they hold
    codes, int8 or float8_e4m3fn.
    """
    k_new, v_new = k_state.clone(), v_state.clone()
    scatter_rows(k_new, k[0], slot_mapping, k_scale)
    scatter_rows(v_new, v[0], slot_mapping, v_scale)
    return k_new, v_new


@kv_write.register_fake
def _(
    k_state: Tensor,
    v_state: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k_state), torch.empty_like(v_state)


@torch.library.custom_op("llmopt::rope_kv_write", mutates_args=())
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    slot_mapping: Tensor,
    interleaved: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``rope`` of q (1, H, T, D) and k, then ``kv_write`` of the rotated k and v; returns (q, k_state, v_state)."""
    k_new, v_new = kv_write(k_state, v_state, rope(k, cos, sin, interleaved), v, slot_mapping, k_scale, v_scale)
    return rope(q, cos, sin, interleaved), k_new, v_new


@rope_kv_write.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    slot_mapping: Tensor,
    interleaved: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), torch.empty_like(k_state), torch.empty_like(v_state)
