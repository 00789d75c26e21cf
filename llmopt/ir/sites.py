"""Calls whose weights may be quantized: finding them, choosing them by the checkpoint's names, putting codes in."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from llmopt.errors import PassError
from llmopt.ir.linears import source_linear
from llmopt.ir.module import Module, Precision
from llmopt.ir.quant import QuantTensor
from llmopt.ir.rewrite import arguments, aten, copy_module, dialect
from llmopt.ir.weights import checkpoint_names
from llmopt.target import TargetInfo

LINEAR, LINEAR_Q = aten.linear.default, dialect.linear_q.default
EXPERTS, EXPERTS_Q = dialect.moe_experts.default, dialect.moe_experts_q.default
EMBEDDING, EMBEDDING_Q = aten.embedding.default, dialect.embedding_q.default
WEIGHTS = {LINEAR: slice(1, 2), EXPERTS: slice(3, 5), EMBEDDING: slice(0, 1)}
"""Arguments of a call that may be quantized."""
CODES = {LINEAR_Q: (1,), EXPERTS_Q: (3, 6), EMBEDDING_Q: (0,)}
"""Arguments of a quantized call that are codes."""


@dataclass(frozen=True)
class Site:
    """A call over one weight (a linear, an embedding) or two (experts)."""

    node: fx.Node
    weights: tuple[str, ...]

    @property
    def input(self) -> fx.Node:
        """The activations the call reads, (..., K)."""
        source = arguments(self.node)[0]
        assert isinstance(source, fx.Node)
        return source


@dataclass(frozen=True)
class Choice:
    """Glob patterns over the checkpoint's tensor names (``.weight`` may be left out); ``where`` is blamed in errors.

    ``lm_head``: the linear that makes the logits too. ``experts``: those of ``llmopt.moe_experts`` too. ``routers``:
    the linears that choose experts too, whose rounding changes which of them run. ``embeddings``: tables too.
    """

    where: str
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    lm_head: bool = False
    experts: bool = False
    routers: bool = False
    embeddings: bool = False

    def sites(self, module: Module, functions: Iterable[fx.GraphModule]) -> list[tuple[fx.GraphModule, Site]]:
        """The chosen calls in program order.

        Raises PassError for a pattern without a match, a fused weight it splits, or a call it chooses by half.
        """
        found = [(function, site) for function in functions for site in self._candidates(module, function)]
        wanted = self._wanted(module, {name for _, site in found for name in site.weights})
        chosen = []
        for function, site in found:
            if wanted.issuperset(site.weights):
                chosen.append((function, site))
            elif half := sorted(wanted.intersection(site.weights)):
                left = next(n for n in site.weights if n not in wanted)
                what = f"{half[0]} is to be quantized and {left} is not, one call reads both"
                raise PassError(what, where=self.where, hint="name both or none of them")
        return chosen

    def _candidates(self, module: Module, function: fx.GraphModule) -> Iterator[Site]:
        left = set() if self.routers else routers(function)
        if not self.lm_head and (head := logits_linear(function)) is not None:
            left.add(head)
        wanted = {LINEAR} | ({EXPERTS} if self.experts else set()) | ({EMBEDDING} if self.embeddings else set())
        for node in function.graph.nodes:
            if node.target not in wanted or node in left:
                continue
            weights = arguments(node)[WEIGHTS[node.target]]
            if all(w.op == "get_attr" for w in weights):
                names = tuple(str(w.target) for w in weights)
                if not any(name in module.precision and module.precision[name] is None for name in names):
                    yield Site(node, names)

    def _wanted(self, module: Module, weights: set[str]) -> set[str]:
        names = {weight: checkpoint_names(weight, module.weights[weight]) for weight in sorted(weights)}
        everything = sorted({name for found in names.values() for name in found})
        if not everything:
            hint = "weights that are quantized already, routers and an LM head not asked for, are left out"
            raise PassError("no layer is left to quantize", where=self.where, hint=hint)
        for pattern in (*self.include, *self.exclude):
            if not any(matches(name, (pattern,)) for name in everything):
                hint = nearest(pattern, everything)
                raise PassError(f"pattern {pattern!r} matches no layer", where=self.where, hint=hint)
        wanted = set()
        for weight, found in names.items():
            chosen = [n for n in found if matches(n, self.include) and not matches(n, self.exclude)]
            if chosen and len(chosen) < len(found):
                left = next(n for n in found if n not in chosen)
                what = f"{chosen[0]} is to be quantized, {left} is not, and they are fused"
                raise PassError(what, where=f"{self.where}, weight {weight}", hint="name all or none of them")
            if chosen:
                wanted.add(weight)
        return wanted


def require_quantized(
    target: TargetInfo, bits: Iterable[int], experts: bool, where: str, embeddings: bool = False
) -> None:
    """Raise PassError unless the target runs codes of these widths, quantized experts and embeddings when asked for."""
    if missing := [b for b in bits if b not in target.quant_bits]:
        known = ", ".join(map(str, target.quant_bits)) or "none"
        what = f"target {target.name} has no {missing[0]}-bit weights"
        raise PassError(what, where=where, hint=f"it has: {known}")
    if experts and not target.quant_experts:
        raise PassError(f"target {target.name} has no quantized experts", where=where, hint="experts: false")
    if embeddings and not target.quant_embeddings:
        raise PassError(f"target {target.name} has no quantized embeddings", where=where, hint="embeddings: false")


def layer_name(module: Module, weight: str) -> str:
    """The checkpoint's names of a weight, for messages."""
    return ", ".join(checkpoint_names(weight, module.weights[weight]))


def group_of(module: Module, weight: str, group_size: int | None, where: str) -> int:
    """Columns that share a scale: the group size, or the whole row. Raises PassError when it does not divide a row."""
    width = module.weights[weight].shape[-1]
    if width % (group_size or width):
        what = f"group_size {group_size} does not divide its {width} input features"
        place = f"{where}, layer {layer_name(module, weight)}"
        raise PassError(what, where=place, hint="exclude it, or choose another size")
    return group_size or width


def precision_of(module: Module, weight: str, bits: int, group_size: int | None, where: str) -> tuple[int, int]:
    """Bits and columns a scale of a weight: those chosen for it, else the given ones. Raises PassError as group_of."""
    chosen = module.precision.get(weight) or Precision(bits, group_size)
    return chosen.bits, group_of(module, weight, chosen.group_size, where)


def by_input(sites: Sequence[Site]) -> list[list[Site]]:
    """Linears grouped by the activations they read, in the order of each group's first call; experts by themselves."""
    groups: dict[fx.Node, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.node if site.node.target == EXPERTS else site.input, []).append(site)
    return sorted(groups.values(), key=lambda group: group[0].node)


def put_codes(module: Module, function: fx.GraphModule, site: Site, tensors: Mapping[str, QuantTensor]) -> None:
    """Replace a call by its quantized form over ``<weight>.codes``, ``.scales``, ``.zeros``, ``.g_idx``.

    ``tensors``: the call's weights by name; those of experts share one format, width and rows a block.
    """
    parts: list[fx.Node | None] = []
    node = site.node
    chosen = [tensors[name] for name in site.weights]
    stems = [free_stem(module, name, tensor) for name, tensor in zip(site.weights, chosen)]
    module.originals |= {stem: module.weights[name] for stem, name in zip(stems, site.weights)}
    for name, tensor in zip(stems, chosen):
        for kind, part in (("codes", tensor.codes), ("scales", tensor.scales), ("zeros", tensor.zeros)):
            parts.append(None if part is None else module.weight_node(function, f"{name}.{kind}", part))
    schemes = [tensor.scheme for tensor in chosen]
    common, blocks = (schemes[0].format, schemes[0].bits, schemes[0].block_n), [s.block_k for s in schemes]
    given = arguments(node)
    if node.target == LINEAR:
        index = chosen[0].g_idx
        g_idx = None if index is None else module.weight_node(function, f"{stems[0]}.g_idx", index)
        target, args = LINEAR_Q, (given[0], *parts, given[2], g_idx, *common, *blocks)
    elif node.target == EMBEDDING:
        target, args = EMBEDDING_Q, (*parts, given[1], *common, *blocks, node.meta["val"].dtype)
    else:
        target, args = EXPERTS_Q, (*given[:3], *parts, *given[5:], *common, *blocks)
    with function.graph.inserting_before(node):
        new = function.graph.call_function(target, tuple(args))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    function.graph.erase_node(node)


def free_stem(module: Module, name: str, tensor: QuantTensor) -> str:
    """What a weight's codes are named after: its name, with + while codes of another quantization have it (a table that
    embeds in one format and makes the logits in another)."""
    while module.weights.get(f"{name}.codes", tensor.codes) is not tensor.codes:
        name += "+"
    return name


def restored(module: Module, keep: Collection[str]) -> Module:
    """A copy whose quantized calls, but those over the weights ``keep``, read what they were made of again, and
    unrounded activations."""
    copy = copy_module(module)
    for function in copy.functions.values():
        for node in [n for n in function.graph.nodes if n.target in CODES]:
            names = quantized_names(node)
            if not set(names).isdisjoint(keep) or not set(names) <= module.originals.keys():
                continue
            weights = [copy.weight_node(function, name, module.originals[name]) for name in names]
            target, args = plain_call(node, weights)
            with function.graph.inserting_before(node):
                plain = function.graph.call_function(target, args)
            plain.meta = dict(node.meta)
            node.replace_all_uses_with(plain)
            function.graph.erase_node(node)
    return copy


def plain_call(node: fx.Node, weights: Sequence[fx.Node]) -> tuple[Any, tuple[Any, ...]]:
    """The call a quantized one was made of: its op and arguments, over these weights."""
    given = arguments(node)
    if node.target == LINEAR_Q:
        return LINEAR, (unrounded(given[0]), *weights, given[4])
    if node.target == EXPERTS_Q:
        return EXPERTS, (unrounded(given[0]), *given[1:3], *weights, *given[9:12])
    return EMBEDDING, (*weights, given[3])


def quantized_names(node: fx.Node) -> tuple[str, ...]:
    """Names of the weights a quantized call's codes were made of."""
    given = arguments(node)
    return tuple(str(given[slot].target).removesuffix(".codes") for slot in CODES[node.target])


def unrounded(source: fx.Node) -> fx.Node:
    """A linear's input before any rounding of activations."""
    return source.args[0] if source.target is dialect.round_activations.default else source  # type: ignore[return-value]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor name, or its layer's, fits one of the glob patterns."""
    return any(fnmatchcase(n, p) for p in patterns for n in (name, name.removesuffix(".weight")))


def nearest(pattern: str, names: list[str]) -> str:
    """A hint: the name nearest to a pattern."""
    near = difflib.get_close_matches(pattern.strip("*."), names, n=1, cutoff=0.3)
    return f"did you mean {near[0]!r}?" if near else f"there are {len(names)} layers, such as {names[:1]}"


def routers(function: fx.GraphModule) -> set[fx.Node]:
    """The linears whose results choose the experts of a call."""
    calls = [node for op in (EXPERTS, EXPERTS_Q) for node in function.graph.find_nodes(op="call_function", target=op)]
    found = {source_linear(arguments(node)[1]) for node in calls}
    return {node for node in found if node is not None and node.target == LINEAR}


def logits_linear(function: fx.GraphModule) -> fx.Node | None:
    """The linear that makes the logits: the first one met from the output upwards."""
    node = next(iter(function.graph.find_nodes(op="output"))).args[0][0]
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target == LINEAR:
            return node
        node = next(iter(node.all_input_nodes), None)
    return None
