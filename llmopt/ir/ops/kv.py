"""KV state writes: functional in the IR, aliased in place by lowering."""

import torch
from torch import Tensor

from llmopt.ir.ops.rope import rope


def scatter_rows(state: Tensor, rows_HTD: Tensor, slot_mapping: Tensor) -> None:
    """In place: state (B, Hk, S, D) at flat slot ``block * S + offset`` takes the row."""
    size = state.shape[2]
    state[slot_mapping // size, :, slot_mapping % size] = rows_HTD.transpose(0, 1).to(state.dtype)


@torch.library.custom_op("llmopt::kv_write", mutates_args=())
def kv_write(k_state: Tensor, v_state: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
    """Write rows k (1, Hk, T, D), v (1, Hk, T, Dv) at slot_mapping (T,) int64; returns the new states.

    States are (B, Hk, S, D) and (B, Hk, S, Dv); a slot is ``block * S + offset``.
    """
    k_new, v_new = k_state.clone(), v_state.clone()
    scatter_rows(k_new, k[0], slot_mapping)
    scatter_rows(v_new, v[0], slot_mapping)
    return k_new, v_new


@kv_write.register_fake
def _(k_state: Tensor, v_state: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``rope`` of q (1, H, T, D) and k, then ``kv_write`` of the rotated k and v; returns (q, k_state, v_state)."""
    k_new, v_new = kv_write(k_state, v_state, rope(k, cos, sin, interleaved), v, slot_mapping)
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
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), torch.empty_like(k_state), torch.empty_like(v_state)
