"""Quantize the weights of linear layers to integers or FP8, by round-to-nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.quant import QuantTensor, RoundToNearest, Scheme
from llmopt.ir.rewrite import sweep
from llmopt.ir.sites import Choice, group_of, layer_name, precision_of, put_codes, require_quantized

FP8_BLOCK = 128  # rows and columns of a block, as DeepSeek-V3 stores them


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Matches ``aten.linear`` over a weight. Replaces it with ``llmopt.linear_q`` over ``<weight>.codes``,
    ``.scales`` and, unless symmetric, ``.zeros``; with ``embeddings``, ``aten.embedding`` with ``llmopt.embedding_q``.

    ``format``: int, or fp8_e4m3, which takes 8 ``bits``. ``bits``: width of a code, one the target supports.
    ``group_size``: input features that share a scale (null: one scale an output channel). ``scales``: of fp8, one a
    ``channel``, a ``tensor``, or ``blocks`` of 128×128. ``include`` and ``exclude``: glob patterns over the
    checkpoint's tensor names, also inside fused weights; ``.weight`` may be left out. ``lm_head``: quantize the layer
    that makes the logits too. ``experts``: also the experts of ``llmopt.moe_experts``, which become
    ``llmopt.moe_experts_q``. ``routers``: also the linears that choose experts. ``embeddings``: also the tables that
    tokens look up; one that makes the logits too is quantized for that only with ``lm_head``.
    """

    name: ClassVar[str] = "quantize_weights"
    after: ClassVar[tuple[str, ...]] = (
        "fuse_qkv",
        "fuse_gate_up",
        "awq",
        "smoothquant",
        "choose_precision",
        "set_precision",
    )
    lossy: ClassVar[bool] = True

    format: Literal["int", "fp8_e4m3"] = "int"
    bits: int = 8
    group_size: Literal[32, 64, 128] | None = None
    scales: Literal["channel", "tensor", "blocks"] = "channel"
    symmetric: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    lm_head: bool = False
    experts: bool = False
    routers: bool = False
    embeddings: bool = False

    def __post_init__(self) -> None:
        if self.format != "int" and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise ValueError(f"{self.format} takes 8 bits, symmetric, and no group_size")
        if self.format == "int" and self.scales != "channel":
            raise ValueError("scales of integers are set by group_size")

    def requires(self, module: Module, ctx: PassContext) -> None:
        """The target runs codes of this width, and quantized experts when they are asked for."""
        where, target = f"pass {self.name}", ctx.target
        require_quantized(target, (self.bits,), self.experts, where, self.embeddings)
        if self.format not in target.quant_formats:
            known = ", ".join(target.quant_formats)
            raise PassError(f"target {target.name} has no {self.format} weights", where=where, hint=f"it has: {known}")

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a call."""
        also = self.lm_head, self.experts, self.routers, self.embeddings
        choice = Choice(f"pass {self.name}", self.include, self.exclude, *also)
        sites = choice.sites(module, self.served(module))
        names = dict.fromkeys(name for _, site in sites for name in site.weights)
        tensors = {name: self._tensor(name, module, ctx) for name in names}
        for function, site in sites:
            put_codes(module, function, site, tensors)
        for function in self.served(module):
            sweep(function)
        module.prune_weights()
        return len(sites)

    def _tensor(self, name: str, module: Module, ctx: PassContext) -> QuantTensor:
        where = f"pass {self.name}"
        if self.format != "int" and name in module.precision:
            place = f"{where}, layer {layer_name(module, name)}"
            raise PassError(f"{self.format} has no bits and group size to choose", where=place, hint="format: int")
        rows, (bits, block) = 1, precision_of(module, name, self.bits, self.group_size, where)
        if self.scales == "tensor":
            rows = module.weights[name].shape[-2]
        elif self.scales == "blocks":
            rows, block = FP8_BLOCK, group_of(module, name, FP8_BLOCK, where)
            if module.weights[name].shape[-2] % rows:
                what = f"blocks of {rows} rows do not divide its {module.weights[name].shape[-2]} output features"
                raise PassError(what, where=f"{where}, layer {layer_name(module, name)}", hint="scales: channel")
        scheme = Scheme(self.format, bits, rows, block, self.symmetric, ctx.dtype)
        return RoundToNearest(layer_name(module, name), module.weights[name], scheme).tensor()


PASS = QuantizeWeights
