"""Linears and experts over weights that are stored quantized run on the stored codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmopt.errors import ConfigError, TargetError, UnsupportedModelError
from llmopt.ir.dequantized import holds_codes, stored_codes
from llmopt.ir.module import Module
from llmopt.ir.quant import QuantTensor
from llmopt.ir.rewrite import arguments, is_weight, sweep
from llmopt.ir.sites import EXPERTS, EXPERTS_Q, LINEAR, LINEAR_Q, Site, matches, nearest, put_codes
from llmopt.ir.weights import Cast, checkpoint_names
from llmopt.target import TargetInfo

SLOTS = {LINEAR: slice(1, 2), EXPERTS: slice(3, 5)}
HINT = "dequantize: [PATTERN] in the recipe turns it into values"


def keep_codes(module: Module, dtype: torch.dtype, dequantize: Sequence[str] = ()) -> int:
    """Matches linears and experts over weights stored quantized. Replaces them with llmopt.linear_q and
    llmopt.moe_experts_q over the stored codes; scales stay as stored where that is ``dtype``, else become fp32.

    Weights whose names in the checkpoint fit a pattern of ``dequantize`` stay values. Returns the rewrites made.
    Raises ConfigError for a pattern without a match, UnsupportedModelError for other weights that cannot keep codes.
    """
    quantized = {name: names for name in module.weights if (names := stored_names(module, name))}
    everything = sorted({name for names in quantized.values() for name in names})
    for pattern in dequantize:
        if everything and not any(matches(name, (pattern,)) for name in everything):
            raise ConfigError(
                f"pattern {pattern!r} matches no quantized tensor",
                where="dequantize",
                hint=nearest(pattern, everything),
            )
    wanted = {name for name, names in quantized.items() if not any(matches(n, dequantize) for n in names)}
    count = 0
    for function in module.functions.values():
        for node in list(function.graph.nodes):
            weights = arguments(node)[SLOTS[node.target]] if node.target in SLOTS else []
            names = tuple(str(w.target) for w in weights if is_weight(w))
            if not wanted.isdisjoint(names) and len(names) == len(weights):
                tensors = {name: tensor_of(module, name, dtype) for name in names}
                check_together(names, tensors, node.target)
                put_codes(module, function, Site(node, names), tensors)
                count += 1
        sweep(function)
    module.prune_weights()
    for name in sorted(wanted.intersection(module.weights)):
        raise UnsupportedModelError(
            f"tensor {quantized[name][0]} is quantized, and more than linears read it", hint=HINT
        )
    return count


def stored_names(module: Module, name: str) -> tuple[str, ...]:
    """The quantized checkpoint tensors a weight is made of; none when it is not."""
    weight = module.weights[name]
    return checkpoint_names(name, weight) if holds_codes(weight) else ()


def tensor_of(module: Module, name: str, dtype: torch.dtype) -> QuantTensor:
    """The codes of a weight, with scales in ``dtype`` or fp32. Raises UnsupportedModelError when it has none."""
    tensor = stored_codes(module.weights[name])
    if tensor is None:
        raise UnsupportedModelError("its parts are quantized in different ways, or not at all", where=name, hint=HINT)
    if tensor.scheme.scale_dtype in (dtype, torch.float32):
        return tensor
    scheme = replace(tensor.scheme, scale_dtype=torch.float32)
    return replace(tensor, scales=Cast(tensor.scales, torch.float32), scheme=scheme)


def check_together(names: Sequence[str], tensors: dict[str, QuantTensor], op: object) -> None:
    """Raise UnsupportedModelError when the weights of one call cannot share it."""
    kinds = {(t.scheme.format, t.scheme.bits, t.scheme.block_n) for t in tensors.values()}
    if len(kinds) > 1:
        raise UnsupportedModelError(f"{names[0]} and {names[1]} are quantized in different ways", hint=HINT)
    if op == EXPERTS and any(t.g_idx is not None for t in tensors.values()):
        raise UnsupportedModelError("experts in activation order (g_idx) are not supported", where=names[0], hint=HINT)


def require_support(module: Module, target: TargetInfo) -> None:
    """Raise TargetError for stored codes the target does not run."""
    for function in module.functions.values():
        for op in (LINEAR_Q, EXPERTS_Q):
            for node in function.graph.find_nodes(op="call_function", target=op):
                given = dict(zip((a.name for a in op._schema.arguments), arguments(node)))
                codes = given["codes"] if op == LINEAR_Q else given["gate_up_codes"]
                where = str(codes.target).removesuffix(".codes")
                bits, format = given["bits"], given["format"]
                if bits not in target.quant_bits or format not in target.quant_formats:
                    what = f"target {target.name} does not run {format} weights of {bits} bits"
                    raise TargetError(what, where=where, hint=HINT)
                if op == EXPERTS_Q and not target.quant_experts:
                    raise TargetError(f"target {target.name} has no quantized experts", where=where, hint=HINT)
