"""Raises a transformers model to the llmopt dialect: its norms, rotary tables, rotations and experts."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any, TypeAlias
from unittest import mock

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmopt.errors import UnsupportedModelError
from llmopt.frontend.hooks import Capture
from llmopt.frontend.probe import (
    Norm,
    RopeForm,
    probe_activation,
    probe_complex_rope,
    probe_gate,
    probe_norm,
    probe_rope,
)
from llmopt.frontend.rotary import LAYOUTS, RotaryTable, Tables, is_rotary, probe_rotary
from llmopt.ir.ops.activation import ACTIVATIONS

Raise: TypeAlias = Callable[[FunctionType, Tables], Callable[..., Any] | None]


class RaisedNorm(nn.Module):
    """A norm module as one op; keeps the weight's name."""

    def __init__(self, norm: Norm, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.norm, self.weight = norm, weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) normalized over C."""
        return self.norm(x, self.weight)


class RaisedConv1D(nn.Module):
    """GPT-2's Conv1D as a linear over the transposed weight."""

    def __init__(self, source: Conv1D) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) gives (..., out)."""
        return nn.functional.linear(x, self.weight.t(), self.bias)


class RaisedActivation(nn.Module):
    """An activation written out in elementwise ops (GPT-2's gelu) as the one op it is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, x's shape and dtype."""
        return ACTIVATIONS[self.kind](x)


def python_modules(model: nn.Module) -> list[ModuleType]:
    """The modeling files of a model's classes."""
    names = {type(m).__module__ for m in model.modules()}
    return [sys.modules[n] for n in sorted(names) if n.startswith("transformers.models.")]


def raise_modules(model: nn.Module, state: Capture, max_context: int) -> tuple[Tables, dict[str, Tensor]]:
    """Replace modules in place where a probe accepts them; returns the tables and the values of new buffers."""
    tables, known = Tables(), dict[str, Tensor]()
    norms: dict[Any, Norm | None] = {}
    for path, module in list(model.named_modules()):
        if is_rotary(module):
            found = probe_rotary(module, max_context, path)
            replace(model, path, RotaryTable(module.config, found, tables, known, path))
        elif isinstance(module, Conv1D):
            replace(model, path, RaisedConv1D(module))
        elif hasattr(module, "has_gate") and hasattr(module, "_apply_gate"):
            state.activations[module] = experts_activation(module, path)
        elif type(module).__module__ == "transformers.activations":
            if kind := probe_activation(module):
                replace(model, path, RaisedActivation(kind))
        elif "norm" in type(module).__name__.lower():
            plain = {k: v for k, v in vars(module).items() if isinstance(v, float | int | bool)}
            key = (type(module), str(sorted(plain.items())), str([p.shape for p in module.parameters()]))
            if key not in norms:
                norms[key] = probe_norm(module)
            if norm := norms[key]:
                replace(model, path, RaisedNorm(norm, getattr(module, "weight", None)))
    return tables, known


def experts_activation(module: Any, path: str) -> str:
    """Activation of an experts module; raises UnsupportedModelError when llmopt.moe_experts cannot express it."""
    where = f"{path} ({type(module).__name__})"
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError("experts without a gate, or with a norm inside, are not supported", where=where)
    kind = probe_gate(module)
    if kind is None:
        raise UnsupportedModelError("the experts' activation is none llmopt knows", where=where)
    return kind


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Set the module at a dotted path."""
    parent, _, leaf = path.rpartition(".")
    new.train(False)
    model.get_submodule(parent)._modules[leaf] = new


def rope_functions(modules: list[ModuleType]) -> Iterator[tuple[ModuleType, str, FunctionType, Raise]]:
    """Module-level functions of q, k (or x) and of cos and sin, or of a complex table, with what raises them."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value):
                names = list(inspect.signature(value).parameters)
                if "cos" in names[1:3] and "sin" in names[2:4]:
                    yield module, name, value, raised_rope
                elif "freqs_cis" in names[1:3]:
                    yield module, name, value, raised_complex_rope


def raised_complex_rope(function: FunctionType, tables: Tables) -> Callable[..., Any] | None:
    """The function as llmopt.rope where its table is ours and a probe agrees; None if never."""
    found = next(((axis, form) for axis in (1, 2) if (form := probe_complex_rope(function, axis))), None)
    if found is None:
        return None
    (axis, form), signature = found, inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        pair = tables.pair(values["freqs_cis"])
        if pair is None:
            return function(*args, **kwargs)
        return rotate(form, list(values.values())[: form.tensors], *pair, axis)

    return wrapper


def raised_rope(function: FunctionType, tables: Tables) -> Callable[..., Any] | None:
    """The function as llmopt.rope where its cos and sin come from our tables and a probe agrees; None if never."""
    forms = {
        (layout, partial): probe_rope(function, expand, extra)
        for layout, expand in LAYOUTS.items()
        for partial, extra in ((False, 0), (True, 4))
    }
    if not any(forms.values()):
        return None
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        cos, sin = tables.half(bound.arguments["cos"]), tables.half(bound.arguments["sin"])
        axis = bound.arguments.get("unsqueeze_dim", 1)
        if cos is None or sin is None or axis not in (1, 2):
            return function(*args, **kwargs)
        values = list(bound.arguments.values())
        form = forms[cos[1], values[0].shape[-1] > 2 * cos[0].shape[-1]]
        if form is None:
            return function(*args, **kwargs)
        return rotate(form, values[: form.tensors], cos[0], sin[0], axis)

    return wrapper


def rotate(form: RopeForm, values: list[Tensor], cos: Tensor, sin: Tensor, axis: int) -> Any:
    """llmopt.rope of each tensor, heads in axis 1 (or 2, then turned)."""
    if axis == 2:
        values = [v.transpose(1, 2) for v in values]
    turned = tuple(form(v, cos, sin) for v in values)
    if axis == 2:
        turned = tuple(v.transpose(1, 2) for v in turned)
    return turned if form.tensors > 1 else turned[0]


@contextmanager
def raised_functions(modules: list[ModuleType], tables: Tables) -> Iterator[None]:
    """Patch the rotation functions of the model's Python modules while the context lasts."""
    with ExitStack() as stack:
        for module, name, function, raised in rope_functions(modules):
            wrapper = raised(function, tables)
            if wrapper is not None:
                stack.enter_context(mock.patch.object(module, name, wrapper))
        yield
