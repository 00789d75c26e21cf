"""Quantize linears to integers column by column, each rounding error made good by the columns left (GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmopt.calibration.experts import Experts, each_expert
from llmopt.calibration.session import Group, Statistics, require_calibration, walk_groups
from llmopt.calibration.spool import Spooled, scalar
from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.ops.linear import dequantize
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.quant import QuantTensor, RoundToNearest, Scheme, block_range, round_codes
from llmopt.ir.rewrite import sweep
from llmopt.ir.sites import EXPERTS, Choice, Site, layer_name, precision_of, put_codes, require_quantized
from llmopt.ir.weights import Stack

BLOCK = 128  # columns whose updates to the rest are done in one matmul
ATTEMPTS = 5  # a Hessian that has no Cholesky factor is damped ten times more, so often


@dataclass(frozen=True)
class Gptq(Pass):
    """Matches ``aten.linear`` and ``llmopt.moe_experts`` over weights. Replaces them with their quantized forms, codes
    chosen for the least error of the layer's output on calibration text: after Frantar et al., "GPTQ" (2023).

    ``bits``, ``group_size``, ``symmetric``, ``include``, ``exclude``, ``lm_head``, ``experts``, ``routers``: as
    quantize_weights. ``act_order``: columns with large activations first. ``static_groups``: scales come from the
    untouched weights, groups stay in column order and no g_idx is needed at run time; without them, and with
    ``act_order``, groups follow the order of columns. ``damp``: share of the mean diagonal added to the Hessian's
    diagonal. Layers are done in order, each on the activations of the quantized ones before it, each expert on the
    rows routed to it; ``Experts`` says what those with few rows are fitted to, and report.json which these are.
    """

    name: ClassVar[str] = "gptq"
    calibrates: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = (
        "fuse_qkv",
        "fuse_gate_up",
        "awq",
        "smoothquant",
        "choose_precision",
        "set_precision",
    )
    lossy: ClassVar[bool] = True

    bits: int = 4
    group_size: Literal[32, 64, 128] | None = 128
    symmetric: bool = True
    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.01
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    lm_head: bool = False
    experts: bool = False
    routers: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise ValueError(f"damp is a share between 0 and 1, not {self.damp}")

    def requires(self, module: Module, ctx: PassContext) -> None:
        """The target runs codes of this width; there is calibration text and one function without states."""
        require_quantized(ctx.target, (self.bits,), self.experts, f"pass {self.name}")
        require_calibration(self, module, ctx)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite a call."""
        (function,) = self.served(module)
        choice = Choice(f"pass {self.name}", self.include, self.exclude, self.lm_head, self.experts, self.routers)
        sites = [site for _, site in choice.sites(module, [function])]
        schemes = {name: self._scheme(module, name, site, ctx) for site in sites for name in site.weights}
        if ctx.calibration is None:
            for site in sites:
                put_codes(module, function, site, self._shapes(module, site, schemes))
        else:
            made: dict[str, QuantTensor] = {}
            for group in walk_groups(self, module, function, sites, ctx.calibration):
                work = self._experts if group.sites[0].node.target == EXPERTS else self._linears
                made |= work(module, group, schemes, made)
                for site in group.sites:
                    put_codes(module, function, site, made)
        sweep(function)
        module.prune_weights()
        return len(sites)

    def _scheme(self, module: Module, name: str, site: Site, ctx: PassContext) -> Scheme:
        where = f"pass {self.name}"
        bits, block = precision_of(module, name, self.bits, self.group_size, where)
        permuted = self.permuted and block < module.weights[name].shape[-1]
        if permuted and site.node.target == EXPERTS:
            place = f"{where}, layer {layer_name(module, name)}"
            raise PassError("experts have no g_idx", where=place, hint="static_groups: true, or act_order: false")
        return Scheme("int", bits, 1, block, self.symmetric, ctx.dtype, permuted)

    @property
    def permuted(self) -> bool:
        """Whether groups follow the activation order."""
        return self.act_order and not self.static_groups and self.group_size is not None

    def _shapes(self, module: Module, site: Site, schemes: dict[str, Scheme]) -> dict[str, QuantTensor]:
        """Stand-ins that no one will read, for a build of shapes alone."""
        return {name: RoundToNearest(name, module.weights[name], schemes[name]).tensor() for name in site.weights}

    def _linears(
        self, module: Module, group: Group, schemes: dict[str, Scheme], made: dict[str, QuantTensor]
    ) -> dict[str, QuantTensor]:
        """The tensors of a group's weights that are not made yet."""
        found: dict[str, QuantTensor] = {}
        statistics = Statistics(group)

        def compute(name: str) -> dict[str, Tensor]:
            values = finite(group.values_of(module.weights[name]), layer_name(module, name))
            return self._solve(values, statistics.gram, schemes[name])

        for name in dict.fromkeys(site.weights[0] for site in group.sites):
            if name not in made:
                saved = group.saved(name, partial(compute, name))
                parts = {kind: Spooled(saved.path, kind) for kind in saved.names}
                codes = replace(parts["codes"], made_from=module.weights[name].parts())
                found[name] = QuantTensor(codes, parts["scales"], parts.get("zeros"), parts.get("g_idx"), schemes[name])
        return found

    def _experts(
        self, module: Module, group: Group, schemes: dict[str, Scheme], made: dict[str, QuantTensor]
    ) -> dict[str, QuantTensor]:
        """The two tensors of a call's experts, solved one expert at a time."""
        names, experts = group.sites[0].weights, Experts(module, group)
        schemes_of = [schemes[name] for name in names]

        def compute(e: int) -> dict[str, Tensor]:
            place = f"{group.layer}, expert {e}"
            first, second = (finite(group.expert(module.weights[n], e), place) for n in names)
            moments, rows = experts.inputs(e)
            gate_up = self._solve(first, moments.gram, schemes_of[0])
            hidden = experts.hidden(e, values_of(gate_up, schemes_of[0]))
            down = self._solve(second, hidden.gram, schemes_of[1])
            both = {f"{i}.{kind}": part for i, parts in enumerate((gate_up, down)) for kind, part in parts.items()}
            return both | {"rows": scalar(rows)}

        saved = each_expert(experts.count, compute, group)
        rows = [int(found.tensor("rows")) for found in saved]
        module.notes.setdefault(self.name, {"experts": []})["experts"].append(experts.note(rows))

        def part(i: int, kind: str) -> Stack:
            return Stack(tuple(Spooled(found.path, f"{i}.{kind}") for found in saved))

        return {
            name: QuantTensor(
                part(i, "codes"), part(i, "scales"), None if scheme.symmetric else part(i, "zeros"), None, scheme
            )
            for i, (name, scheme) in enumerate(zip(names, schemes_of))
        }

    def _solve(self, values: Tensor, gram: Tensor, scheme: Scheme) -> dict[str, Tensor]:
        return solve(values, gram, scheme, self.act_order, self.static_groups, self.damp)


def values_of(parts: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """The matrix (N, K) fp32 that codes, scales and zeros stand for."""
    return dequantize(parts["codes"], parts["scales"], parts.get("zeros"), None, "int", scheme.bits, 1, scheme.block_k)


def finite(values: Tensor, layer: str) -> Tensor:
    """The values; raises PassError naming the layer for NaN and infinity."""
    if not bool(values.isfinite().all()):
        raise PassError("weights hold NaN or infinity", where=f"pass gptq, layer {layer}")
    return values


def solve(
    weight: Tensor, hessian: Tensor, scheme: Scheme, act_order: bool, static_groups: bool, damp: float
) -> dict[str, Tensor]:
    """Codes (N, K) uint8, scales and zeros (N, groups), and with permuted groups g_idx (K,), of a weight (N, K) fp32.

    ``hessian`` (K, K): the Gram matrix of the inputs, up to a factor, on the weight's device. A column that was never
    active keeps its rounding and passes no error on. Raises PassError when the Hessian cannot be factored.
    """
    rows, columns = weight.shape
    group, device = scheme.block_k, weight.device
    groups = columns // group
    in_order = torch.arange(columns, device=device)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else in_order
    upper = inverse_factor(hessian[order][:, order], damp)
    fixed = static_groups or groups == 1
    index = order // group if fixed else in_order // group
    # Column by column, so columns lie in rows here: what one step reads and writes is contiguous.
    left = weight.T[order]
    scales, zeros = torch.empty(2, groups, rows, device=device)
    if fixed:
        scales, zeros = (part.T.contiguous() for part in block_range(weight.reshape(rows, 1, groups, group), scheme))
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=device)
    step = BLOCK if fixed else group
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        block, factor = left[start:stop], upper[start:stop, start:stop]
        if not fixed:
            found = block_range(block.T.reshape(rows, 1, 1, group), scheme)
            scales[start // group], zeros[start // group] = (part[:, 0] for part in found)
        errors = torch.empty_like(block)
        for i, g in enumerate(index[start:stop].cpu().tolist()):
            code = round_codes(block[i], scales[g], zeros[g], scheme)
            errors[i] = (block[i] - (code.float() - zeros[g]) * scales[g]) / factor[i, i]
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
            codes[start + i] = code
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    in_columns = torch.empty_like(codes)
    in_columns[order] = codes
    parts = {"codes": in_columns.T, "scales": scales.T.to(scheme.scale_dtype)}
    if not scheme.symmetric:
        parts["zeros"] = zeros.T.to(torch.uint8)
    if scheme.permuted:
        parts["g_idx"] = torch.empty(columns, dtype=torch.int32, device=device)
        parts["g_idx"][order] = index.int()
    return parts


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse (K, K); columns never active become independent ones."""
    diagonal = hessian.diagonal()
    unused = diagonal == 0
    shift = float(diagonal.mean()) or 1.0
    for attempt in range(ATTEMPTS):
        damped = hessian + torch.diag(torch.where(unused, 1.0, damp * 10**attempt * shift))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
    raise PassError("the Hessian has no Cholesky factor", where="pass gptq", hint="raise damp, or calibrate on more")


PASS = Gptq
