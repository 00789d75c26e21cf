"""Quantize the weights of linear layers to integers, by round-to-nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from torch import fx

from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.quant import QuantTensor, RoundToNearest, Scheme
from llmopt.ir.rewrite import arguments, aten, dialect, sweep
from llmopt.ir.weights import Weight, checkpoint_names

LINEAR, LINEAR_Q = aten.linear.default, dialect.linear_q.default
EXPERTS, EXPERTS_Q = dialect.moe_experts.default, dialect.moe_experts_q.default


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Matches ``aten.linear`` over a weight. Replaces it with ``llmopt.linear_q`` over ``<weight>.codes``,
    ``.scales`` and, unless symmetric, ``.zeros``.

    ``bits``: width of a code, one the target supports. ``group_size``: input features that share a scale (null: one
    scale an output channel). ``include`` and ``exclude``: glob patterns over the checkpoint's tensor names, also inside
    fused weights; ``.weight`` may be left out. ``lm_head``: quantize the layer that makes the logits too. ``experts``:
    also the experts of ``llmopt.moe_experts``, which become ``llmopt.moe_experts_q``.
    """

    name: ClassVar[str] = "quantize_weights"
    after: ClassVar[tuple[str, ...]] = ("fuse_qkv", "fuse_gate_up")
    lossy: ClassVar[bool] = True

    bits: int = 8
    group_size: Literal[32, 64, 128] | None = None
    symmetric: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    lm_head: bool = False
    experts: bool = False

    def requires(self, module: Module, ctx: PassContext) -> None:
        """The target runs codes of this width, and quantized experts when they are asked for."""
        where, target = f"pass {self.name}", ctx.target
        if self.bits not in target.quant_bits:
            known = ", ".join(map(str, target.quant_bits)) or "none"
            raise PassError(
                f"target {target.name} has no {self.bits}-bit weights", where=where, hint=f"it has: {known}"
            )
        if self.experts and not target.quant_experts:
            raise PassError(f"target {target.name} has no quantized experts", where=where, hint="experts: false")

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a call."""
        sites = [(function, *site) for function in self.served(module) for site in self._sites(function)]
        wanted = self._select(module, {str(w.target) for *_, weights in sites for w in weights})
        made: dict[str, QuantTensor] = {}
        count = 0
        for function, node, weights in sites:
            names = [str(w.target) for w in weights]
            if not wanted.issuperset(names):
                self._refuse_half(names, wanted)
                continue
            for name in names:
                made.setdefault(name, self._tensor(name, module.weights[name], ctx))
            replace(module, function, node, {name: made[name] for name in names})
            count += 1
        for function in self.served(module):
            sweep(function)
        module.prune_weights()
        return count

    def _sites(self, function: fx.GraphModule) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
        """Calls that may be quantized, with their weights."""
        head = None if self.lm_head else logits_linear(function)
        for node in function.graph.nodes:
            slots = {LINEAR: slice(1, 2), EXPERTS: slice(3, 5)}.get(node.target)
            if slots is None or node is head or (node.target == EXPERTS and not self.experts):
                continue
            weights = arguments(node)[slots]
            if all(w.op == "get_attr" for w in weights):
                yield node, weights

    def _select(self, module: Module, weights: set[str]) -> set[str]:
        """Weights the patterns choose. Raises PassError for a pattern without a match or a fused weight it splits."""
        names = {weight: checkpoint_names(weight, module.weights[weight]) for weight in sorted(weights)}
        everything = sorted({name for found in names.values() for name in found})
        for pattern in (*self.include, *self.exclude):
            if not any(matches(name, (pattern,)) for name in everything):
                hint = nearest(pattern, everything)
                raise PassError(f"pattern {pattern!r} matches no layer", where=f"pass {self.name}", hint=hint)
        wanted = set()
        for weight, found in names.items():
            chosen = [n for n in found if matches(n, self.include) and not matches(n, self.exclude)]
            if chosen and len(chosen) < len(found):
                left = next(n for n in found if n not in chosen)
                what = f"{chosen[0]} is to be quantized, {left} is not, and they are fused"
                raise PassError(what, where=f"pass {self.name}, weight {weight}", hint="name all or none of them")
            if chosen:
                wanted.add(weight)
        return wanted

    def _refuse_half(self, names: list[str], wanted: set[str]) -> None:
        """Raise PassError when one matrix of a call is to be quantized and the other is not."""
        if half := sorted(wanted.intersection(names)):
            left = next(n for n in names if n not in wanted)
            what = f"{half[0]} is to be quantized and {left} is not, one call reads both"
            raise PassError(what, where=f"pass {self.name}", hint="name both or none of them")

    def _tensor(self, name: str, weight: Weight, ctx: PassContext) -> QuantTensor:
        width = weight.shape[-1]
        block = self.group_size or width
        if width % block:
            layer = ", ".join(checkpoint_names(name, weight))
            what = f"group_size {block} does not divide its {width} input features"
            raise PassError(what, where=f"pass {self.name}, layer {layer}", hint="exclude it, or choose another size")
        scheme = Scheme("int", self.bits, 1, block, self.symmetric, ctx.dtype)
        return RoundToNearest(", ".join(checkpoint_names(name, weight)), weight, scheme).tensor()


def replace(module: Module, function: fx.GraphModule, node: fx.Node, tensors: Mapping[str, QuantTensor]) -> None:
    """Put the quantized form of a call in its place; ``tensors``: its weights by name, in order."""
    parts: list[fx.Node | None] = []
    for name, tensor in tensors.items():
        for kind, part in (("codes", tensor.codes), ("scales", tensor.scales), ("zeros", tensor.zeros)):
            parts.append(None if part is None else module.weight_node(function, f"{name}.{kind}", part))
    schemes = [tensor.scheme for tensor in tensors.values()]
    common, blocks = (schemes[0].format, schemes[0].bits, schemes[0].block_n), [s.block_k for s in schemes]
    given = arguments(node)
    if node.target == LINEAR:
        target, args = LINEAR_Q, (given[0], *parts, given[2], None, *common, *blocks)
    else:
        target, args = EXPERTS_Q, (*given[:3], *parts, *given[5:], *common, *blocks)
    with function.graph.inserting_before(node):
        new = function.graph.call_function(target, tuple(args))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    function.graph.erase_node(node)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor name, or its layer's, fits one of the glob patterns."""
    return any(fnmatchcase(n, p) for p in patterns for n in (name, name.removesuffix(".weight")))


def nearest(pattern: str, names: list[str]) -> str:
    """A hint: the name nearest to a pattern."""
    near = difflib.get_close_matches(pattern.strip("*."), names, n=1, cutoff=0.3)
    return f"did you mean {near[0]!r}?" if near else f"there are {len(names)} layers, such as {names[:1]}"


def logits_linear(function: fx.GraphModule) -> fx.Node | None:
    """The linear that makes the logits: the first one met from the output upwards."""
    node = next(iter(function.graph.find_nodes(op="output"))).args[0][0]
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target == LINEAR:
            return node
        node = next(iter(node.all_input_nodes), None)
    return None


PASS = QuantizeWeights
