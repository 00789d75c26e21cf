"""Attention: the captured form over one sequence, and the form that reads KV states."""

import torch
from torch import Tensor

from llmopt.ir.ops.kv import decode


def masked_attention(
    q_HTD: Tensor, k_HSD: Tensor, v_HSD: Tensor, mask_TS: Tensor, sinks_H: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Softmax attention in fp32 of grouped heads; masked-out keys may hold NaN. Result (T, H, Dv)."""
    groups = q_HTD.shape[0] // k_HSD.shape[0]
    any_row = mask_TS.any(0)[None, :, None]
    k = torch.where(any_row, k_HSD.float(), 0.0).repeat_interleave(groups, 0)
    v = torch.where(any_row, v_HSD.float(), 0.0).repeat_interleave(groups, 0)
    scores = q_HTD.float() @ k.transpose(1, 2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask_TS, float("-inf"))
    if sinks_H is not None:
        sink = sinks_H.float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    probs = scores.softmax(-1)[..., : k.shape[1]]
    return (probs @ v).transpose(0, 1).to(q_HTD.dtype)


def visible(query: Tensor, key: Tensor, window: int, sink_tokens: int) -> Tensor:
    """Mask (T, S): causal; within ``window`` (0 is unlimited) or among the first ``sink_tokens``; key < 0 is empty."""
    q, k = query[:, None], key[None, :]
    mask = (k <= q) & (k >= 0)
    return mask & ((q - k < window) | (k < sink_tokens)) if window else mask


@torch.library.custom_op("llmopt::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> Tensor:
    """Causal attention over one sequence, as captured, before any KV cache.

    q (1, H, T, D), k (1, Hk, T, D), v (1, Hk, T, Dv); sinks (H,) are extra logits that take part in the softmax
    only; ``window`` 0 and ``softcap`` 0 are off. Result (1, T, H, Dv), q's dtype.
    """
    rows = torch.arange(q.shape[2], device=q.device)
    mask = visible(rows, rows, window, 0)
    return masked_attention(q[0], k[0], v[0], mask, sinks, scale, softcap)[None].contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def ring_positions(slots: Tensor, length: int, capacity: int, sinks: int) -> Tensor:
    """Position each ring slot holds when the sequence has ``length`` tokens (-1: empty or overwritten)."""
    period = capacity - sinks
    latest = length - 1 - (length - 1 - slots) % period
    if sinks:
        latest = length - 1 - (length - 1 - sinks - (slots - sinks)) % period
        latest = torch.where(slots < sinks, torch.where(slots < length, slots, -1), latest)
        return torch.where((slots >= sinks) & (latest < sinks), -1, latest)
    return latest


def gathered(state: Tensor, blocks: Tensor, scale_H: Tensor | None) -> Tensor:
    """A sequence's blocks of a state as (Hk, slots, D)."""
    rows = state[blocks.long()].transpose(0, 1).flatten(1, 2)
    return rows if scale_H is None else decode(rows, scale_H)


@torch.library.custom_op("llmopt::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sink_tokens: int,
    ring: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of a ragged batch over KV states already written for the step.

    q (1, H, T, D); k_state (B, Hk, S, D), v_state (B, Hk, S, Dv) in blocks of S tokens; block_table (n, W) int32;
    cu_seqlens (n + 1,) int32 row offsets; seq_lens (n,) int32 lengths including the new rows. ``ring``: one block
    a sequence, addressed as StateGroup says. ``sink_tokens`` first positions stay visible beside the window.
    With k_scale and v_scale (Hk,) fp32 the states hold codes, each worth ``code * scale`` of its head.
    Result (1, T, H, Dv). A sequence with no rows is skipped.
    """
    out = q.new_zeros((q.shape[2], q.shape[1], v_state.shape[3]))
    bounds = cu_seqlens.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        start, stop = bounds[i], bounds[i + 1]
        if start == stop:
            continue
        blocks = block_table[i, :1] if ring else block_table[i, : -(-length // k_state.shape[2])]
        k, v = gathered(k_state, blocks, k_scale), gathered(v_state, blocks, v_scale)
        slots = torch.arange(k.shape[1], device=q.device)
        key = ring_positions(slots, length, k.shape[1], sink_tokens) if ring else slots
        query = torch.arange(length - (stop - start), length, device=q.device)
        mask = visible(query, key, window, sink_tokens)
        out[start:stop] = masked_attention(q[0, :, start:stop], k, v, mask, sinks, scale, softcap)
    return out[None]


@cached_attention.register_fake
def _(
    q: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sink_tokens: int,
    ring: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v_state.shape[3]))
