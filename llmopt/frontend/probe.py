"""Numeric probes: run a module's or function's own code on random input to learn what it computes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt.ir.ops.activation import ACTIVATIONS
from llmopt.ir.ops.moe import gate

ROWS = 5
MAX_WIDTH = 1 << 17


@dataclass(frozen=True)
class Norm:
    """What a norm module computes: llmopt.rms_norm's parameters, or aten.layer_norm's when ``centred``."""

    eps: float
    offset: float
    mul_in_fp32: bool
    centred: bool = False

    def __call__(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], weight, None, self.eps)
        return torch.ops.llmopt.rms_norm(  # type: ignore[no-any-return]
            x, weight, self.eps, self.offset, self.mul_in_fp32
        )


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Reproducible normal numbers, the same in every process."""
    generator = torch.Generator().manual_seed(len(shape) * 7919 + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def close(a: Any, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two results agree relative to their largest element."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30))


def norm_width(module: nn.Module) -> int | None:
    """Length of the axis a leaf module could normalize: that of its only parameter, a vector called weight."""
    parameters = dict(module.named_parameters())
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    if (
        any(True for _ in module.children())
        or any(True for _ in module.buffers())
        or "norm" not in type(module).__name__.lower()
    ):
        return None
    if isinstance(module, nn.LayerNorm):
        return None  # one aten op already
    if not parameters:
        return int((getattr(module, "normalized_shape", None) or (64,))[-1])
    weight = parameters.get("weight")
    if len(parameters) > 1 or weight is None or weight.dim() != 1 or weight.numel() > MAX_WIDTH:
        return None
    return weight.numel()


def probe_norm(module: nn.Module) -> Norm | None:
    """The norm a module (perhaps on meta) computes, found by running a copy of it in fp32 and bf16; None if none."""
    width = norm_width(module)
    if width is None:
        return None
    weighted = next(module.parameters(), None) is not None
    trial: Any = copy.deepcopy(module).to_empty(device="cpu").float()
    weight = random(width) if weighted else None
    if weighted:
        trial.weight.data.copy_(weight)
    # a tiny scale makes eps count, so that a wrong eps cannot pass
    inputs = [random(ROWS, width), random(ROWS, width, scale=1e-3) + 1e-3]
    for eps in candidates(trial):
        for offset in (0.0, 1.0) if weighted else (0.0,):
            for centred in (False, True) if offset == 0.0 else (False,):
                norm = Norm(eps, offset, False, centred)
                if all(close(call(trial, x), norm(x, weight)) for x in inputs):
                    return norm if centred or not weighted else exact_in_bf16(trial, norm, inputs)
    return None


def candidates(module: nn.Module) -> list[float]:
    """The small floats among a module's attributes: one of them is eps."""
    found = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.1]
    return [*dict.fromkeys(found), torch.finfo(torch.float32).eps]


def call(module: Callable[..., Any], *args: Tensor) -> Any:
    """A call that may fail: None then, since the probe only asks whether the code behaves like a norm."""
    try:
        with torch.no_grad():
            return module(*args)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None


def exact_in_bf16(module: nn.Module, norm: Norm, inputs: list[Tensor]) -> Norm | None:
    """The rounding order a module uses in bf16: the one that equals it in nearly all elements."""
    trial = copy.deepcopy(module).bfloat16()
    weight = trial.weight.data
    best, best_share = None, 0.98
    for mul_in_fp32 in (False, True):
        option = Norm(norm.eps, norm.offset, mul_in_fp32)
        pairs = [(call(trial, x.bfloat16()), option(x.bfloat16(), weight)) for x in inputs]  # type: ignore[arg-type]
        if not all(close(a, b, 2**-6) for a, b in pairs):
            continue
        share = min(float((a == b).float().mean()) for a, b in pairs)
        if share > best_share:
            best, best_share = option, share
    return best


def probe_activation(module: nn.Module) -> str | None:
    """Name of the activation a module without parameters applies elementwise; None when it is none of ours."""
    if (
        next(module.parameters(), None) is not None
        or any(True for _ in module.children())
        or any(True for _ in module.buffers())
    ):
        return None
    x = random(ROWS, 64, scale=4.0)
    result = call(module, x)
    return next((kind for kind, function in ACTIVATIONS.items() if close(result, function(x), 1e-6)), None)


@dataclass(frozen=True)
class RopeForm:
    """How a Python function rotates: its pairing, whether it sorts the pairs into halves first, tensors it takes."""

    interleaved: bool
    sorts: bool
    tensors: int

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.sorts:
            x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
        return torch.ops.llmopt.rope(x, cos, sin, self.interleaved)  # type: ignore[no-any-return]


def probe_rope(function: Callable[..., Any], expand: Callable[[Tensor], Tensor], extra: int) -> RopeForm | None:
    """Whether ``function(q[, k], cos, sin)`` is llmopt.rope of each tensor; ``expand`` lays out cos from its half.

    ``extra`` is the number of dims beyond the rotated ones (partial rotary).
    """
    names = list(inspect.signature(function).parameters)
    tensors = names.index("cos")
    rows, half = 6, 4
    angles = random(1, rows, half, scale=3.0)
    cos, sin = angles.cos(), angles.sin()
    parts = [random(1, heads, rows, 2 * half + extra) for heads in (3, 2)][:tensors]
    results = rotated(function, parts, expand(cos), expand(sin))
    for interleaved, sorts in ((False, False), (True, False), (False, True)):
        form = RopeForm(interleaved, sorts, tensors)
        if results and all(close(r, form(x, cos, sin)) for r, x in zip(results, parts)):
            return form
    return None


def rotated(function: Callable[..., Any], parts: list[Tensor], *tables: Tensor) -> tuple[Any, ...]:
    """What a function of tensors and tables gives for each of the tensors; nothing when it gives another number."""
    result = call(function, *parts, *tables)
    results = result if isinstance(result, tuple) else (result,)
    return results if len(results) == len(parts) else ()


def probe_complex_rope(function: Callable[..., Any], axis: int) -> RopeForm | None:
    """Whether ``function(q[, k], turns)``, of complex ``turns`` (1, T, F), is llmopt.rope of each tensor, whose heads
    are in ``axis`` 1 or 2."""
    rows, half = 6, 4
    tensors = list(inspect.signature(function).parameters).index("freqs_cis")
    angles = random(1, rows, half, scale=3.0)
    parts = [random(1, heads, rows, 2 * half) for heads in (3, 2)][:tensors]
    turns = torch.polar(torch.ones_like(angles), angles)
    results = rotated(function, [x.transpose(1, axis) for x in parts], turns)
    form = RopeForm(interleaved=True, sorts=False, tensors=tensors)
    turned = [form(x, angles.cos(), angles.sin()).transpose(1, axis) for x in parts]
    return form if results and all(close(r, y) for r, y in zip(results, turned)) else None


def probe_gate(module: nn.Module) -> str | None:
    """Name of the gated activation an experts module applies to (rows, 2I); None when it is none of ours."""
    x = random(ROWS, 32, scale=6.0)
    result = call(module._apply_gate, x)  # type: ignore[arg-type]
    return next((kind for kind in (*ACTIVATIONS, "swiglu_oai") if close(result, gate(x, kind))), None)
