"""Checks that a capture means what the model computes: every layer's attention, no mixing of rows elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from llmopt.errors import UnsupportedModelError
from llmopt.frontend.hooks import NAME, Capture, register
from llmopt.ir.module import Module

REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "softmax", "_softmax", "log_softmax", "cumsum", "cumprod", "sort",
    "topk", "argmax", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "flip", "roll", "logcumsumexp",
}  # fmt: skip
MIXERS = {
    "conv1d",
    "conv2d",
    "convolution",
    "conv_transpose1d",
    "scaled_dot_product_attention",
    "arange",
    "tril",
    "triu",
}
MIXER_WORDS = ("attention", "attn", "mixer", "mamba", "ssm", "delta", "conv", "recurrent", "rwkv", "lstm")


def check_interfaces(model: PreTrainedModel) -> None:
    """Point the model's attention and experts at llmopt; raises UnsupportedModelError when they have no interface."""
    register()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise UnsupportedModelError(
                "its attention does not go through transformers' attention interface",
                where=describe(model, mixer(first_layer(model) or model)),
            )
    model.set_attn_implementation(NAME)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(
            "its attention does not go through transformers' attention interface",
            where=describe(model, mixer(first_layer(model) or model)),
        )


def layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The decoder layers: the outermost ModuleList of the config's length."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return list(lists[0]) if lists else []


def layer_count(model: PreTrainedModel) -> int:
    """Number of layers the config names."""
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", 0) or 0)


def first_layer(model: PreTrainedModel) -> nn.Module | None:
    """The first decoder layer."""
    return next(iter(layers(model, layer_count(model))), None)


def mixer(layer: nn.Module) -> nn.Module:
    """The submodule of a layer that mixes tokens, by its class name; the layer itself when none looks like it."""
    for child in layer.modules():
        if child is not layer and any(word in type(child).__name__.lower() for word in MIXER_WORDS):
            return child
    return layer


def describe(model: nn.Module, module: nn.Module) -> str:
    """Path and class of a module."""
    path = next((path for path, m in model.named_modules() if m is module), "")
    return f"{path} ({type(module).__name__})" if path else type(module).__name__


def check_graph(module: Module, model: PreTrainedModel, state: Capture) -> int | None:
    """Raise UnsupportedModelError on a layer without captured attention, ops that mix rows, or state.

    Returns longrope's switch length, if the graph has one.
    """
    graph = module.functions["step"].graph
    check_layers(graph, model, state)
    for node in graph.nodes:
        if node.op == "call_function":
            check_rows(node)
    switches = {
        node.args[5]
        for node in graph.find_nodes(op="call_function", target=torch.ops.llmopt.rotary_table.default)
        if node.args[3] is not None
    }
    if len(switches) > 1:
        raise UnsupportedModelError(f"several longrope switch lengths {sorted(switches)}")
    return switches.pop() if switches else None


def unseen_layers(model: PreTrainedModel, state: Capture) -> list[nn.Module]:
    """Decoder layers with no attention call the hooks saw."""
    seen = set(state.attention)
    return [
        layer
        for layer in layers(model, layer_count(model))
        if not seen & {state.paths[m] for m in layer.modules() if m in state.paths}
    ]


def check_layers(graph: fx.Graph, model: PreTrainedModel, state: Capture) -> None:
    """Every layer has its attention op, and the graph as many as the hooks saw."""
    count = len(graph.find_nodes(op="call_function", target=torch.ops.llmopt.attention.default))
    for layer in unseen_layers(model, state):
        raise UnsupportedModelError(
            "the layer mixes tokens outside transformers' attention interface", where=describe(model, mixer(layer))
        )
    if not layers(model, layer_count(model)) or count != len(state.attention):
        raise UnsupportedModelError(
            f"{count} attention ops captured, {len(state.attention)} called, {layer_count(model)} layers configured",
            where=type(model).__name__,
        )


def check_rows(node: fx.Node) -> None:
    """Raise when an op other than attention mixes rows: packed sequences would leak into each other."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return
    name = node.target._opname
    where = node.meta.get("scope") or node.name
    if name in MIXERS and (name != "arange" or any(symbolic(a) for a in node.args)):
        raise UnsupportedModelError(f"aten.{name} mixes the rows of a step outside attention", where=where)
    if name in REDUCTIONS and reduces_rows(node):
        raise UnsupportedModelError(f"aten.{name} over the rows of a step", where=where)
    if name in ("mm", "bmm", "matmul") and symbolic(value(node.args[0]).shape[-1]):
        raise UnsupportedModelError(f"aten.{name} contracts over the rows of a step", where=where)


def value(argument: Any) -> Any:
    """The fake value of an argument."""
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def symbolic(argument: Any) -> bool:
    """Whether a scalar depends on T."""
    argument = value(argument)
    return isinstance(argument, torch.SymInt) and not argument.node.expr.is_number


def reduces_rows(node: fx.Node) -> bool:
    """Whether a reduction's axes include a symbolic one."""
    source = value(node.args[0])
    if not isinstance(source, torch.Tensor):
        return False
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**dict(zip((a.name for a in schema), node.args)), **node.kwargs}
    default = {a.name: a.default_value for a in schema}
    axes = next((given.get(k, default.get(k)) for k in ("dim", "dims") if k in default), None)
    if "other" in default:
        return False
    if axes is None:
        axes = list(range(source.dim()))
    axes = axes if isinstance(axes, list | tuple) else [axes]
    return any(symbolic(source.shape[a]) for a in axes)
