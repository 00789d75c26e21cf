"""Rotary embedding modules: their tables found by running them, then one llmopt.rotary_table op."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.errors import UnsupportedModelError
from llmopt.frontend.probe import close

COMPLEX = "complex"
"""The layout of a table of complex numbers cos + i·sin, which rotate pairs (2i, 2i + 1) as complex numbers."""
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "doubled": lambda half: torch.cat((half, half), dim=-1),
    "repeated": lambda half: torch.repeat_interleave(half, 2, dim=-1),
    "half": lambda half: half,
}


@dataclass(frozen=True)
class Table:
    """A rotary table: inverse frequencies (F,), factor on cos and sin, layout, and the long pair of longrope."""

    inv_freq: Tensor
    scale: float
    layout: str
    inv_freq_long: Tensor | None = None
    scale_long: float = 1.0
    switch: int = 0


@dataclass
class Tables:
    """cos and sin of the traced step: which half table (1, T, F) an expanded tensor came from, or which two a complex
    one."""

    halves: dict[int, tuple[Tensor, Tensor, str]] = field(default_factory=dict)
    pairs: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def record(self, expanded: Tensor, half: Tensor, layout: str) -> None:
        """Remember an expanded tensor (kept alive, so that its id stays its own)."""
        self.halves[id(expanded)] = (expanded, half, layout)

    def record_pair(self, turns: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Remember a complex table (kept alive too)."""
        self.pairs[id(turns)] = (turns, cos, sin)

    def pair(self, tensor: Any) -> tuple[Tensor, Tensor] | None:
        """cos and sin behind a complex table, if a rotary module of ours made it."""
        found = self.pairs.get(id(tensor))
        return found[1:] if found else None

    def half(self, tensor: Any) -> tuple[Tensor, str] | None:
        """The half table and layout behind a tensor, if a rotary module of ours made it."""
        found = self.halves.get(id(tensor))
        return found[1:] if found else None


def frequency_names(module: nn.Module) -> list[str]:
    """Buffers of inverse frequencies a module reads: one, or one a layer type (Gemma 3)."""
    names = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
    return [name for name in names if not name.endswith("original_inv_freq")]


def is_rotary(module: nn.Module) -> bool:
    """Whether a module computes cos and sin of positions from inverse frequencies."""
    return bool(frequency_names(module)) and not list(module.parameters())


def probe_rotary(module: Any, max_context: int, path: str) -> dict[str | None, Table]:
    """The tables of a rotary module by layer type (None: the only one).

    Runs a real copy of it; raises UnsupportedModelError when it computes something else.
    """
    tables: dict[str | None, Table] = {}
    for name in frequency_names(module):
        kind = name.removesuffix("inv_freq").removesuffix("_") or None
        tables[kind] = probe_table(module, name, kind, max_context, path)
    return tables


def probe_table(module: Any, name: str, kind: str | None, max_context: int, path: str) -> Table:
    """One table. Dynamic scaling takes the frequencies of the whole context, longrope keeps two and a switch."""
    where = f"{path} ({type(module).__name__})"
    parameters = module.config.rope_parameters
    parameters = parameters.get(kind, parameters) if kind else parameters
    switch = int(parameters.get("original_max_position_embeddings") or 0)

    def at(length: int) -> Table:
        return run_copy(module, name, kind, max(length, 1), where)

    whole = at(max_context)
    if not 0 < switch < max_context:
        return whole
    short, long = at(switch), at(switch + 1)
    if torch.equal(short.inv_freq, whole.inv_freq) and short.scale == whole.scale:
        return whole
    if not torch.equal(long.inv_freq, whole.inv_freq) or long.scale != whole.scale:
        return whole
    return Table(short.inv_freq, short.scale, short.layout, long.inv_freq, long.scale, switch)


def run_copy(module: Any, name: str, kind: str | None, length: int, where: str) -> Table:
    """Run a fresh CPU copy over positions up to ``length - 1`` and read its table off, checked against its output."""
    try:
        trial: Any = type(module)(module.config)
    except TypeError as error:
        raise UnsupportedModelError(f"rotary embedding cannot be rebuilt: {error}", where=where) from error
    positions = torch.tensor([sorted({0, 1, 2, length // 2, length - 1})])
    extra = {"layer_type": kind} if "layer_type" in inspect.signature(trial.forward).parameters else {}
    with torch.no_grad():
        result = trial(torch.zeros(1, positions.shape[1], 8), positions, **extra)
    prefix = f"{kind}_" if kind else ""
    inv_freq = getattr(trial, name).detach().float().clone()
    scale = float(getattr(trial, f"{prefix}attention_scaling", 1.0))
    layouts = LAYOUTS
    if isinstance(result, Tensor) and result.is_complex():
        result, layouts = (result.real, result.imag), {COMPLEX: lambda half: half}
    if isinstance(result, tuple) and len(result) == 2 and inv_freq.dim() == 1:
        angles = positions[..., None].float() * inv_freq
        for layout, expand in layouts.items():
            expected = (expand(angles.cos() * scale), expand(angles.sin() * scale))
            if all(close(a, b, 1e-4) for a, b in zip(result, expected)):
                return Table(inv_freq, scale, layout)
    raise UnsupportedModelError("rotary embedding computes no known cos and sin table", where=where)


class RotaryTable(nn.Module):
    """Stands in for a rotary module: cos and sin in its layout, over one llmopt.rotary_table op. What remains of a
    complex table after the rotations that read it are raised is an operator that no target knows."""

    def __init__(
        self, config: Any, tables: dict[str | None, Table], made: Tables, known: dict[str, Tensor], path: str
    ) -> None:
        """``config``: the module's own, which models may ask for; ``known`` receives the value of each buffer by its
        dotted name."""
        super().__init__()
        self.config, self.tables, self.made = config, tables, made
        for kind, table in tables.items():
            for suffix, value in (("inv_freq", table.inv_freq), ("inv_freq_long", table.inv_freq_long)):
                if value is not None:
                    leaf = f"{kind}_{suffix}" if kind else suffix
                    self.register_buffer(leaf, value.to("meta"), persistent=False)
                    known[f"{path}.{leaf}"] = value

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """cos and sin (1, T, D) in x's dtype for position_ids (1, T), or one complex table (1, T, F) of fp32."""
        kind = layer_type if layer_type in self.tables else None
        table, prefix = self.tables[kind], f"{kind}_" if kind else ""
        halves = torch.ops.llmopt.rotary_table(
            position_ids,
            getattr(self, f"{prefix}inv_freq"),
            table.scale,
            getattr(self, f"{prefix}inv_freq_long", None),
            table.scale_long,
            table.switch,
            None,
            torch.float32 if table.layout == COMPLEX else x.dtype,
        )
        if table.layout == COMPLEX:
            turns = torch.complex(*halves)
            self.made.record_pair(turns, *halves)
            return turns
        expanded = tuple(LAYOUTS[table.layout](half) for half in halves)
        for full, half in zip(expanded, halves):
            self.made.record(full, half, table.layout)
        return expanded[0], expanded[1]
