"""Module: the unit passes rewrite: fx functions, weights, symbolic dims and states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from llmopt.ir.weights import Weight, WeightTable
from llmopt.program import StateGroup


@dataclass(frozen=True)
class ModelConfig:
    """What the compiler needs of config.json and generation_config.json (``raw`` keeps the rest)."""

    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Precision:
    """Bits of a code and columns that share a scale (None: one scale a row)."""

    bits: int
    group_size: int | None


@dataclass
class Module:
    """fx functions over shared weights.

    A function's placeholders are its inputs. A ``get_attr`` node is a weight: its target is the name in
    ``weights``, its ``meta["val"]`` a fake tensor; the fx module need not have the attribute. ``dims`` maps a
    dim name to (min, max), and ``symbols`` the ShapeEnv's symbol to the dim name. ``states`` is empty until
    rewrite_kv_cache; ``state_outputs`` maps a function's state placeholder to the index of its final version
    among the outputs. ``originals``: what quantized weights were made of, by the name their codes extend.
    ``precision``: bits and group size chosen for a weight, whatever a quantizer's own are (None: leave it as it is).
    ``notes``: what passes want to have in report.json, by their names. ``propagated``: see ir/propagation.py.
    """

    functions: dict[str, fx.GraphModule]
    weights: WeightTable
    dims: dict[str, tuple[int, int]]
    symbols: dict[str, str]
    config: ModelConfig
    states: list[StateGroup] = field(default_factory=list)
    state_outputs: dict[str, int] = field(default_factory=dict)
    rope_switch: int | None = None
    originals: dict[str, Weight] = field(default_factory=dict)
    precision: dict[str, Precision | None] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    propagated: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_quantized(self) -> bool:
        """Whether passes quantized weights or states."""
        return bool(self.originals) or any(s.scales is not None for group in self.states for s in group.states)

    @property
    def fake_mode(self) -> Any:
        """The fake-tensor mode every ``meta["val"]`` of the module belongs to."""
        graph = next(iter(self.functions.values())).graph
        return next(n.meta["val"].fake_mode for n in graph.nodes if n.op == "placeholder")

    @contextmanager
    def faking(self) -> Iterator[None]:
        """Calls compute fake values. Without the dispatcher torch 2.11 specializes T and refuses a linear without
        bias."""
        with self.fake_mode, enable_python_dispatcher():
            yield

    def fake(self, shape: tuple[int | torch.SymInt, ...], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor of the module's mode."""
        with self.fake_mode:
            return torch.empty(shape, dtype=dtype, device="meta")

    def weight_node(self, function: fx.GraphModule, name: str, weight: Weight | None = None) -> fx.Node:
        """The get_attr node of a weight in a function, created at its start if missing.

        ``weight`` registers a new entry of the table; without it the name must exist (KeyError).
        """
        if weight is not None:
            self.weights[name] = weight
        for node in function.graph.find_nodes(op="get_attr", target=name):
            return node  # type: ignore[no-any-return]
        entry = self.weights[name]
        first = next(iter(function.graph.nodes))
        with function.graph.inserting_before(first):
            # no attribute stands behind the node: beside X.weight there may be X.weight.codes
            node = function.graph.create_node("get_attr", name)
        node.meta["val"] = self.fake(entry.shape, entry.dtype)
        return node

    def prune_weights(self) -> None:
        """Forget weights that no function reads."""
        used = {n.target for f in self.functions.values() for n in f.graph.nodes if n.op == "get_attr"}
        for name in set(self.weights) - used:
            del self.weights[name]


def attach(root: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Make ``name`` resolve on an fx root, which warns of get_attr nodes that name nothing.

    Values are read from ``meta["val"]``, never from the root: a container may take the place of a tensor whose name
    is a prefix (``a.weight`` and ``a.weight.codes``).
    """
    *path, leaf = name.split(".")
    for part in path:
        if not isinstance(getattr(root, part, None), torch.nn.Module):
            if hasattr(root, part):
                delattr(root, part)
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    root.register_buffer(leaf, value, persistent=False)
