"""Give the layers that match patterns bits and a group size of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from llmopt.ir.module import Module, Precision
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.sites import Choice, group_of, require_quantized


@dataclass(frozen=True)
class SetPrecision(Pass):
    """Matches the calls quantize_weights would. Replaces nothing: notes ``bits`` and ``group_size``, which awq,
    quantize_weights and gptq, listed after it, use for these weights instead of their own.

    ``include``, ``exclude``, ``lm_head``, ``experts``, ``routers``, ``embeddings``: as quantize_weights. A recipe may
    list it as often as it likes: where patterns of two overlap, the later one counts, and all of them before what
    choose_precision chose. A layer is quantized only when the quantizer's own patterns match it too.
    """

    name: ClassVar[str] = "set_precision"
    after: ClassVar[tuple[str, ...]] = ("fuse_qkv", "fuse_gate_up", "choose_precision")

    bits: int
    group_size: Literal[32, 64, 128] | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    lm_head: bool = False
    experts: bool = False
    routers: bool = False
    embeddings: bool = False

    def requires(self, module: Module, ctx: PassContext) -> None:
        """The target runs codes of this width, and the kinds of calls asked for."""
        require_quantized(ctx.target, (self.bits,), self.experts, f"pass {self.name}", self.embeddings)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One a weight."""
        where, also = f"pass {self.name}", (self.lm_head, self.experts, self.routers, self.embeddings)
        sites = Choice(where, self.include, self.exclude, *also).sites(module, self.served(module))
        names = dict.fromkeys(name for _, site in sites for name in site.weights)
        for name in names:
            group_of(module, name, self.group_size, where)
            module.precision[name] = Precision(self.bits, self.group_size)
        return len(names)


PASS = SetPrecision
