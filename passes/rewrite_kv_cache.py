"""Turns attention over one sequence into attention of a ragged batch over threaded KV states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from llmopt.errors import PassError
from llmopt.ir.module import Module
from llmopt.ir.ops.kv import CODES
from llmopt.ir.pass_manager import Pass, PassContext
from llmopt.ir.rewrite import arguments, call, dialect, new_dim, placeholder, results, sweep
from llmopt.program import StateGroup, StateSpec

MAX_SEQUENCES = 1 << 16
MAX_BLOCKS = 1 << 24


@dataclass(frozen=True)
class RewriteKvCache(Pass):
    """Matches every ``llmopt.attention``. Replaces with ``llmopt.kv_write`` into the layer's states and
    ``llmopt.cached_attention`` over them; adds the step's metadata and the states to the inputs, the final
    states to the outputs. Keys and values that quantize_kv rounds (``llmopt.round_kv``) become codes in the states.

    ``layout``: ``paged`` (blocks of ``block_size`` tokens, default 16), ``slots`` (one block of max_context tokens
    a sequence) or ``ring``: layers with an attention window keep ``sinks`` + window - 1 + ``max_chunk``
    tokens (defaults 0 and 512), one group a window; layers without one, or whose window covers max_context,
    use ``full_layout`` (paged, the default, or slots). ``sinks`` first tokens stay visible beside the window.
    """

    name: ClassVar[str] = "rewrite_kv_cache"
    after: ClassVar[tuple[str, ...]] = ("fuse_qkv", "quantize_kv")

    layout: Literal["paged", "slots", "ring"] = "paged"
    block_size: int | None = None
    sinks: int | None = None
    max_chunk: int | None = None
    full_layout: Literal["paged", "slots"] | None = None

    def __post_init__(self) -> None:
        ring_only = {"sinks": self.sinks, "max_chunk": self.max_chunk, "full_layout": self.full_layout}
        for key, value in ring_only.items():
            if value is not None and self.layout != "ring":
                raise ValueError(f"{key} belongs to layout ring, not {self.layout}")
        if self.block_size is not None and self.full != "paged":
            raise ValueError("block_size belongs to the paged layout")
        for key, value, least in (
            ("block_size", self.block_size, 1),
            ("sinks", self.sinks, 0),
            ("max_chunk", self.max_chunk, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{key} must be at least {least}")

    @property
    def full(self) -> str:
        """The layout of layers whose whole context stays."""
        return (self.full_layout or "paged") if self.layout == "ring" else self.layout

    @property
    def changes_numerics(self) -> bool:
        """Sinks show a windowed layer tokens it did not see."""
        return bool(self.sinks)

    def requires(self, module: Module, ctx: PassContext) -> None:
        """Attention not yet rewritten, and layouts the target can run."""
        where = "pass rewrite_kv_cache"
        if module.states:
            raise PassError("the module already has KV states", where=where)
        if self.functions is not None:
            raise PassError("states belong to the whole module: leave out functions", where=where)
        for layout in {self.layout, self.full} - set(ctx.target.layouts):
            raise PassError(f"target {ctx.target.name} cannot run layout {layout}", where=where,
                            hint=f"it runs {', '.join(ctx.target.layouts)}")  # fmt: skip
        windows = {self._window(n, module) for f in module.functions.values() for n in attentions(f)}
        if self.sinks and windows <= {0}:
            raise PassError("sinks need layers with an attention window below max_context", where=where)

    def run(self, module: Module, ctx: PassContext) -> int:
        """One rewrite an attention layer."""
        first = next(iter(module.functions.values()))
        module.states = self._groups(module, first)
        sizes = new_dim(module, "N", 1, MAX_SEQUENCES), {g.name: self._group_dims(module, g) for g in module.states}
        return sum(Rewrite(self, module, function, *sizes).run() for function in module.functions.values())

    def _group_dims(self, module: Module, group: StateGroup) -> tuple[torch.SymInt, torch.SymInt]:
        width = new_dim(module, f"W_{group.name}", 1, group.blocks_for(module.config.max_context))
        return width, new_dim(module, f"B_{group.name}", 1, MAX_BLOCKS)

    def _window(self, node: fx.Node, module: Module) -> int:
        """The window that makes the layer a ring (0: none)."""
        window = int(arguments(node)[5])
        return window if self.layout == "ring" and window < module.config.max_context else 0

    def _groups(self, module: Module, function: fx.GraphModule) -> list[StateGroup]:
        groups: dict[str, StateGroup] = {}
        for layer, node in enumerate(attentions(function)):
            window = self._window(node, module)
            group = self._group(window, module.config.max_context)
            group = groups.setdefault(group.name, group)
            specs = tuple(
                Stored.of(rows).spec(f"{letter}_{layer}", layer) for letter, rows in zip("kv", arguments(node)[1:3])
            )
            groups[group.name] = replace(group, states=group.states + specs)
        return list(groups.values())

    def _group(self, window: int, max_context: int) -> StateGroup:
        if window:
            sinks = self.sinks or 0
            size = sinks + window - 1 + (self.max_chunk or 512)
            # a wrapped ring has lost what a shorter sequence would need again
            return StateGroup(f"ring_w{window}", "ring", size, (), window, sinks, truncatable=False)
        if self.full == "slots":
            return StateGroup("slots", "slots", max_context, ())
        return StateGroup("paged", "paged", self.block_size or 16, (), shareable=True)


@dataclass(frozen=True)
class Stored:
    """Keys or values (1, Hk, T, D) that go into a state, and how: as they are, or as codes under a scale a head."""

    rows: fx.Node
    dtype: torch.dtype
    scale: fx.Node | None = None

    @staticmethod
    def of(source: fx.Node) -> Stored:
        """What an attention reads, before rounding."""
        if source.target is not dialect.round_kv.default:
            return Stored(source, source.meta["val"].dtype)
        rows, scale, format = source.args
        return Stored(rows, CODES[str(format)], scale)  # type: ignore[arg-type]

    def spec(self, name: str, layer: int) -> StateSpec:
        """The state."""
        _, heads, _, width = self.rows.meta["val"].shape
        scales = None if self.scale is None else str(self.scale.target)
        return StateSpec(name, int(heads), int(width), str(self.dtype).removeprefix("torch."), layer, scales)


class Rewrite:
    """The rewrite of one function."""

    def __init__(
        self,
        options: RewriteKvCache,
        module: Module,
        function: fx.GraphModule,
        sequences: torch.SymInt,
        group_dims: dict[str, tuple[torch.SymInt, torch.SymInt]],
    ) -> None:
        self.options, self.module, self.function = options, module, function
        self.sequences, self.group_dims = sequences, group_dims
        self.last = [n for n in function.graph.nodes if n.op == "placeholder"][-1]
        self.inputs = {n.name: n for n in function.graph.nodes if n.op == "placeholder"}

    def run(self) -> int:
        """Rewrite every attention; returns how many."""
        self._add_inputs()
        layers = list(attentions(self.function))
        finals: dict[str, fx.Node] = {}
        for layer, node in enumerate(layers):
            finals |= self._rewrite(layer, node)
        output = next(n for n in self.function.graph.nodes if n.op == "output")
        outputs: list[Any] = list(output.args[0])
        names = [spec.input for group in self.module.states for spec in group.states]
        self.module.state_outputs = {name: len(outputs) + i for i, name in enumerate(names)}
        output.args = ((*outputs, *(finals[name] for name in names)),)
        sweep(self.function)  # the roundings
        return len(layers)

    def _add_inputs(self) -> None:
        rows = self.inputs["input_ids"].meta["val"].shape[1]
        self._input("cu_seqlens", (self.sequences + 1,), torch.int32)
        self._input("seq_lens", (self.sequences,), torch.int32)
        self._longrope(rows)
        for group in self.module.states:
            width, _ = self.group_dims[group.name]
            self._input(f"block_table_{group.name}", (self.sequences, width), torch.int32)
            self._input(f"slot_mapping_{group.name}", (rows,), torch.int64)
        for group in self.module.states:
            for spec in group.states:
                shape = (self.group_dims[group.name][1], spec.heads, group.block_size, spec.head_dim)
                self._input(spec.input, shape, getattr(torch, spec.dtype))

    def _input(self, name: str, shape: tuple[int | torch.SymInt, ...], dtype: torch.dtype) -> None:
        self.last = placeholder(self.function, self.last, name, self.module.fake(shape, dtype))
        self.inputs[name] = self.last

    def _longrope(self, rows: torch.SymInt) -> None:
        """A ragged step mixes lengths: the table is chosen by each row's sequence length, given as an input."""
        tables = self.function.graph.find_nodes(op="call_function", target=dialect.rotary_table.default)
        two = [node for node in tables if arguments(node)[3] is not None]
        if two:
            self._input("rope_lens", (1, rows), torch.int64)
        for node in two:
            given = arguments(node)
            self.module.rope_switch = int(given[5])
            node.args, node.kwargs = (*given[:6], self.inputs["rope_lens"], given[7]), {}

    def _rewrite(self, layer: int, node: fx.Node) -> dict[str, fx.Node]:
        q, k, v, sinks, scale, window, softcap = arguments(node)
        stored = [Stored.of(rows) for rows in (k, v)]
        scales = [s.scale for s in stored] if any(s.scale is not None for s in stored) else []
        names = f"k_{layer}", f"v_{layer}"
        group = next(g for g in self.module.states if any(s.input == names[0] for s in g.states))
        table, slots = (self.inputs[f"{kind}_{group.name}"] for kind in ("block_table", "slot_mapping"))
        old = [self.inputs[name] for name in names]
        ring = group.kind == "ring"
        with self.function.graph.inserting_before(node):
            rows = [*old, *(s.rows for s in stored), slots, *scales]
            written = call(self.function, self.module, dialect.kv_write.default, *rows, like=node)
            new = results(self.function, written)
        metadata = table, self.inputs["cu_seqlens"], self.inputs["seq_lens"]
        with self.function.graph.inserting_before(node):
            operands = (q, *new, *metadata, sinks, scale, window, softcap, group.sinks, ring, *scales)
            attended = call(self.function, self.module, dialect.cached_attention.default, *operands, like=node)
        node.replace_all_uses_with(attended)
        self.function.graph.erase_node(node)
        return dict(zip(names, new))


def attentions(function: fx.GraphModule) -> list[fx.Node]:
    """The attention nodes, in program order: their index is the layer of the states."""
    return [n for n in function.graph.nodes if n.target is dialect.attention.default]


PASS = RewriteKvCache
