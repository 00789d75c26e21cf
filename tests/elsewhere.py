"""A device that no machine has: what is on it is computed on the CPU, and must not meet what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy:0")
TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operators whose indices may be on the CPU, as with CUDA."""


class OnDevice(Tensor):
    """A tensor on the device; ``inner`` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        """Around a tensor of the CPU."""
        made = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing may outlive the mode that knows the device."""
        raise AssertionError(f"{func} outside of Elsewhere")


class Elsewhere(TorchDispatchMode):
    """While entered, ``DEVICE`` exists. ``calls``: operators that ran there, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operator on the tensors inside; its result is where its operands are, or where it is told to be."""
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        told = kwargs.get("device")
        if told is not None and torch.device(told).type == DEVICE.type:
            kwargs["device"], to = torch.device("cpu"), True
        else:
            to = bool(there) and told is None
        if there and told is None and name not in TAKES_INDICES and any(tensor.dim() for tensor in here):
            raise AssertionError(f"{name} mixes devices: {[tuple(t.shape) for t in (*there, *here)]}")
        if there or to:
            self.calls[name] = self.calls.get(name, 0) + 1
        result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if name.endswith("_") and not name.startswith("_") and there:
            return args[0]
        return tree_map(_wrap, result) if to else result


def _inside(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _wrap(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) else value
