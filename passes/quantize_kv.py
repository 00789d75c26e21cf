"""Keep keys and values as int8 or FP8 codes, with a scale a head from calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from llmopt.calibration.session import require_calibration, spool_of
from llmopt.calibration.walk import Walk
from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.ops.rounding import LIMITS
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import arguments, call, dialect
from llmopt.ir.samples import Calibration
from llmopt.ir.weights import Constant

HEADROOM = {"int8": 1.0, "fp8_e4m3": 2.0}
"""Largest value that a head can keep, over the largest on calibration text. What is beyond saturates. E4M3 has as many
bits at every magnitude, so that room costs nothing there; in int8 it would cost precision."""


@dataclass(frozen=True)
class QuantizeKv(Pass):
    """Matches ``llmopt.attention``. Replaces its keys, rotated as they are stored, and its values with
    ``llmopt.round_kv`` of them, over the weights ``<attention>.k_scale`` and ``.v_scale``, float32, one a KV head.
    List rewrite_kv_cache after it: it makes states of the codes.

    ``format``: int8 or fp8_e4m3. ``scales``: ``calibrated``, by each head's largest value on calibration text, or
    ``unit``, which is 1 for every head.
    """

    name: ClassVar[str] = "quantize_kv"
    after: ClassVar[tuple[str, ...]] = (
        "fuse_qkv", "awq", "smoothquant", "choose_precision", "quantize_weights", "gptq", "quantize_activations",
    )  # fmt: skip
    lossy: ClassVar[bool] = True

    format: Literal["int8", "fp8_e4m3"] = "fp8_e4m3"
    scales: Literal["calibrated", "unit"] = "calibrated"

    @property
    def needs_calibration(self) -> bool:
        """Unit scales need no text."""
        return self.scales == "calibrated"

    def requires(self, module: Module, ctx: PassContext) -> None:
        """The target keeps states of this format; calibrated scales need text."""
        where = f"pass {self.name}"
        if module.states:
            raise PassError("quantize_kv must come before rewrite_kv_cache", where=where)
        if self.functions is not None:
            raise PassError("states belong to the whole module: leave out functions", where=where)
        if self.format not in ctx.target.kv_formats:
            known = ", ".join(ctx.target.kv_formats) or "none"
            what = f"target {ctx.target.name} has no {self.format} KV states"
            raise PassError(what, where=where, hint=f"it has: {known}")
        if self.needs_calibration:
            require_calibration(self, module, ctx)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite an attention layer."""
        count = 0
        for function in module.functions.values():
            layers = list(function.graph.find_nodes(op="call_function", target=dialect.attention.default))
            walk = self._walk(module, function, len(layers), ctx.calibration)
            for layer, node in enumerate(layers):
                name = node.meta.get("scope") or f"attention.{layer}"
                scales = {k: torch.ones(heads_of(rows)) for k, rows in keys_and_values(node).items()}
                if walk is not None:
                    walk.advance(node)
                    saved = walk.spool.saved(f"layer{layer}", partial(self._scales, walk, node, name))
                    scales = saved.tensors()
                self._round(module, function, node, name, scales)
            count += len(layers)
        return count

    def _walk(
        self, module: Module, function: fx.GraphModule, layers: int, calibration: Calibration | None
    ) -> Walk | None:
        if not self.needs_calibration or calibration is None:
            return None
        spool = spool_of(self, module, function, calibration, repr(self))
        return Walk(module, function, calibration, spool, layers, self.name)

    def _scales(self, walk: Walk, node: fx.Node, name: str) -> dict[str, Tensor]:
        """Scales (Hk,) of keys and values. Raises PassError naming the layer for NaN and infinity."""
        found = {}
        for kind, source in keys_and_values(node).items():
            largest = torch.zeros(heads_of(source))
            for rows in walk.values(source):
                if not bool(rows.isfinite().all()):
                    what = f"the {kind} hold NaN or infinity"
                    raise PassError(what, where=f"calibration, layer {name}")
                largest = torch.maximum(largest, rows[0].float().abs().amax((1, 2)).cpu())
            scale = largest * (HEADROOM[self.format] / LIMITS[self.format])
            found[kind] = torch.where(scale > 0, scale, 1.0)
        return found

    def _round(
        self, module: Module, function: fx.GraphModule, node: fx.Node, name: str, scales: dict[str, Tensor]
    ) -> None:
        for slot, (kind, source) in enumerate(keys_and_values(node).items(), 1):
            scale = module.weight_node(function, f"{name}.{kind[0]}_scale", Constant(scales[kind]))
            with function.graph.inserting_before(node):
                made = call(function, module, dialect.round_kv.default, source, scale, self.format, like=node)
            node.update_arg(slot, made)


def keys_and_values(node: fx.Node) -> dict[str, fx.Node]:
    """What an attention reads, each (1, Hk, T, D)."""
    return dict(zip(("keys", "values"), arguments(node)[1:3]))


def heads_of(rows: fx.Node) -> int:
    """KV heads."""
    return int(rows.meta["val"].shape[1])


PASS = QuantizeKv
