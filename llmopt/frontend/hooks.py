"""transformers' attention, mask and experts interfaces, answered with one llmopt op each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import llmopt.ir.ops  # noqa: F401  (registers the dialect)
from llmopt.errors import UnsupportedModelError

NAME = "llmopt"
CAUSAL, SLIDING = "create_causal_mask", "create_sliding_window_causal_mask"
RECURRENT = "create_recurrent_attention_mask"  # a padding mask: None without padding, whatever the layer does
MASK_MAKERS = [name for name in dir(masking_utils) if name.startswith("create_") and name.endswith("_mask")]
EXTRA_MASKS = ("or_mask_function", "and_mask_function", "block_sequence_ids")


@dataclass(frozen=True)
class Mask:
    """A marker that travels through the model as its attention mask: a window, or the name of an unsupported kind."""

    marker: Tensor
    kind: int | str


@dataclass
class Capture:
    """What the hooks saw of one traced forward: attention modules by path and the masks they were given."""

    paths: dict[nn.Module, str]
    activations: dict[nn.Module, str] = field(default_factory=dict)
    attention: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    masks: dict[int, Mask] = field(default_factory=dict)
    causal_asked: bool = False

    def where(self, module: nn.Module) -> str:
        """Path and class of a module, for messages."""
        return f"{self.paths.get(module, '?')} ({type(module).__name__})"


current: list[Capture] = []


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention interface: q (1, H, T, D), k and v (1, Hk, T, D) give (1, T, H, Dv).

    The mask the model asked for decides the window, as in transformers' eager attention.
    """
    state = current[-1]
    if query.dim() != 4 or query.shape[1] % key.shape[1]:
        raise UnsupportedModelError(
            f"attention of q {tuple(query.shape)} over k {tuple(key.shape)}", where=state.where(module)
        )
    window = mask_window(state, module, attention_mask)
    cap = softcap if softcap is not None else getattr(module, "attn_logit_softcapping", None)
    scale = scaling if scaling is not None else getattr(module, "scaling", query.shape[-1] ** -0.5)
    state.attention.append(state.paths.get(module, "?"))
    out = torch.ops.llmopt.attention(query, key, value, s_aux, float(scale), window, float(cap or 0.0))
    return out, None


def mask_window(state: Capture, module: nn.Module, mask: Tensor | None) -> int:
    """Window a mask stands for (0: plain causal); raises UnsupportedModelError on a mask no hook made."""
    if mask is None:
        if state.causal_asked:
            return 0
        raise UnsupportedModelError("attention without a causal mask", where=state.where(module))
    made = state.masks.get(id(mask))
    if made is None:
        raise UnsupportedModelError("the model builds an attention mask of its own", where=state.where(module))
    if isinstance(made.kind, str):
        raise UnsupportedModelError(f"attention mask {made.kind} is not supported", where=state.where(module))
    return made.kind


def mask_maker(state: Capture, name: str) -> Callable[..., Tensor | None]:
    """A stand-in for a ``transformers.masking_utils.create_*_mask``: None for causal, else a marker tensor."""

    def make(config: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        extra = [key for key in EXTRA_MASKS if kwargs.get(key) is not None]
        kind: int | str = 0
        if name == RECURRENT:
            return None
        if name not in (CAUSAL, SLIDING) or extra or not getattr(config, "is_causal", True):
            kind = " with ".join((name, *extra))
        elif name == SLIDING:
            kind = int(getattr(config, "sliding_window", None) or 0)
        state.causal_asked = True
        if kind == 0:
            return None
        marker = torch.empty(0, device="meta")
        state.masks[id(marker)] = Mask(marker, kind)
        return marker

    return make


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts interface: hidden (T, C), index and weights (T, k) give (T, C)."""
    state = current[-1]
    state.experts.append(state.paths.get(self, "?"))
    gate_up, down = self.gate_up_proj, self.down_proj
    if self.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    return torch.ops.llmopt.moe_experts(  # type: ignore[no-any-return]
        hidden_states,
        top_k_index,
        top_k_weights,
        gate_up,
        down,
        self.gate_up_proj_bias if self.has_bias else None,
        self.down_proj_bias if self.has_bias else None,
        state.activations[self],
    )


class WholeSlices(TorchFunctionMode):
    """Slicing that takes all of a tensor gives the tensor itself.

    Models cut masks and rotary tables to the rows whose logits are wanted, which are all here: what a hook made would
    come out as something that no hook knows.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """``x[:, 0:]`` is x; everything else is as it was."""
        if func is Tensor.__getitem__ and takes_all(args[1]):
            return args[0]
        return func(*args, **(kwargs or {}))


def takes_all(index: Any) -> bool:
    """Whether an index is nothing but slices from the first to the last element."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        isinstance(part, slice)
        and (part.start is None or (type(part.start) is int and part.start == 0))
        and part.stop is None
        and part.step in (None, 1)
        for part in parts
    )


def register() -> None:
    """Make ``llmopt`` an attention and an experts implementation transformers can be set to."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


@contextmanager
def installed(state: Capture, modules: list[ModuleType]) -> Iterator[None]:
    """Answer the interfaces for ``state`` while the context lasts; ``modules`` are the model's Python modules."""
    makers = {name: mask_maker(state, name) for name in MASK_MAKERS}
    originals = {getattr(masking_utils, name): makers[name] for name in MASK_MAKERS}
    layers = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    patches: list[Any] = [
        mock.patch.object(module, name, originals[value])
        for module in (*modules, masking_utils)
        for name, value in list(vars(module).items())
        if isinstance(value, FunctionType) and value in originals
    ]
    patches.append(mock.patch.dict(layers, {k: originals[f] for k, f in layers.items() if isinstance(f, FunctionType)}))
    current.append(state)
    try:
        for patch in patches:
            patch.start()
        with WholeSlices():
            yield
    finally:
        for patch in reversed(patches):
            patch.stop()
        current.pop()
