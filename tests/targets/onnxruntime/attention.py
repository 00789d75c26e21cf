"""A one-layer model without weights, built around any form of cached attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.export import Dim

import llmopt.ir.ops  # noqa: F401
from llmopt.ir.module import ModelConfig, Module
from llmopt.ir.weights import Constant
from llmopt.lower.lowering import lower
from llmopt.lower.readers import Reader
from llmopt.program import Program, StateGroup, StateSpec, TensorType

CONTEXT, INV_FREQ = 64, "rotary.inv_freq"
SCALES = "attention.0.k_scale", "attention.0.v_scale"


@dataclass(frozen=True)
class Attention:
    """Sizes and options of the layer. ``rotate``: pairs rotated, 0 for none; ``fused``: through rope_kv_write;
    ``twice``: a second attention reads the same states; ``mixed``: k is rotated, q is not; ``codes``: int8 states."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    sink_tokens: int = 0
    rotate: int = 8
    interleaved: bool = False
    fused: bool = False
    twice: bool = False
    mixed: bool = False
    codes: bool = False

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights of the program."""
        heads = torch.arange(self.kv_heads, dtype=torch.float32)
        scales = {name: 0.012 + 0.001 * i + 0.0003 * heads for i, name in enumerate(SCALES)} if self.codes else {}
        frequencies = 1.0 / (torch.arange(self.rotate, dtype=torch.float32) + 1)
        return scales | ({INV_FREQ: frequencies} if self.rotate else {})

    def readers(self) -> dict[str, Reader]:
        """Weights of the program, as the target reads them."""
        return {n: Reader(Constant(t), TensorType(tuple(t.shape), "float32")) for n, t in self.tensors().items()}

    def heads_of(self, ids: torch.Tensor, seed: float, heads: int, width: int) -> torch.Tensor:
        """Rows (1, heads, T, width) that depend on the tokens."""
        wave = torch.arange(heads * width, dtype=torch.float32) * seed
        rows = torch.sin(ids[..., None].float() * wave + wave)
        return rows.view(1, ids.shape[1], heads, width).transpose(1, 2)

    def step(self, weights: dict[str, torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits (1, T, heads * value_dim) and the states."""
        ids, positions, cu_seqlens, seq_lens, table, slots, k_state, v_state = inputs
        scales = tuple(weights[name] for name in SCALES if self.codes)
        ops = torch.ops.llmopt
        q = self.heads_of(ids, 0.7, self.heads, self.head_dim)
        k = self.heads_of(ids, 1.3, self.kv_heads, self.head_dim)
        v = self.heads_of(ids, 2.1, self.kv_heads, self.value_dim)
        if self.rotate:
            cos, sin = ops.rotary_table(positions, weights[INV_FREQ], 1.1, None, 1.0, 0, None, torch.float32)
            if self.fused:
                operands = (q, k, v, cos, sin, k_state, v_state, slots, self.interleaved, *scales)
                q, k_state, v_state = ops.rope_kv_write(*operands)
            else:
                k = ops.rope(k, cos, sin, self.interleaved)
                q = q if self.mixed else ops.rope(q, cos, sin, self.interleaved)
        if not (self.rotate and self.fused):
            k_state, v_state = ops.kv_write(k_state, v_state, k, v, slots, *scales)
        sinks = torch.arange(self.heads, dtype=torch.float32) * 0.4 if self.sinks else None

        def attend(query: torch.Tensor) -> torch.Tensor:
            out = ops.cached_attention(
                query, k_state, v_state, table, cu_seqlens, seq_lens, sinks, 0.4, self.window, self.softcap,
                self.sink_tokens, False, *scales,
            )  # fmt: skip
            return out.reshape(1, ids.shape[1], self.heads * self.value_dim)

        logits = attend(q)
        return (logits + attend(q * 0.5) if self.twice else logits), k_state, v_state

    def program(self) -> Program:
        """Traced and lowered, once for all layers that are equal."""
        return lowered(self)


class Step(torch.nn.Module):
    """The layer with the inputs' names every program uses."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        for name, value in attention.tensors().items():
            self.register_buffer(name.replace(".", "_"), value)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table_slots: torch.Tensor,
        slot_mapping_slots: torch.Tensor,
        k_0: torch.Tensor,
        v_0: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        inputs = (input_ids, position_ids, cu_seqlens, seq_lens, block_table_slots, slot_mapping_slots, k_0, v_0)
        weights = {name: getattr(self, name.replace(".", "_")) for name in self.attention.tensors()}
        return self.attention.step(weights, *inputs)


@cache
def lowered(layer: Attention) -> Program:
    """The program of a layer."""
    dtype = torch.int8 if layer.codes else torch.float32
    k = torch.zeros(3, layer.kv_heads, CONTEXT, layer.head_dim, dtype=dtype)
    v = torch.zeros(3, layer.kv_heads, CONTEXT, layer.value_dim, dtype=dtype)
    ids, table = torch.arange(7)[None], torch.zeros(2, 1, dtype=torch.int32)
    bounds, lengths = torch.tensor([0, 4, 7], dtype=torch.int32), torch.tensor([9, 6], dtype=torch.int32)
    rows, auto = {1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}
    shapes = (rows, rows, auto, auto, auto, {0: Dim.DYNAMIC}, auto, auto)
    inputs = (ids, ids.clone(), bounds, lengths, table, ids[0].clone(), k, v)
    traced = torch.export.export(Step(layer), inputs, dynamic_shapes=shapes, strict=False).graph_module
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and "_assert" in str(node.target):
            traced.graph.erase_node(node)
    holders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    kept, (k_scale, v_scale) = str(dtype).removeprefix("torch."), SCALES if layer.codes else (None, None)
    specs = (StateSpec("k_0", layer.kv_heads, layer.head_dim, kept, 0, k_scale),
             StateSpec("v_0", layer.kv_heads, layer.value_dim, kept, 0, v_scale))  # fmt: skip
    weights = {f"b_{name.replace('.', '_')}": (name, value) for name, value in layer.tensors().items()}
    buffers = [n for n in holders if n.name in weights]
    holders = [n for n in holders if n not in buffers]
    symbols = {str(holders[0].meta["val"].shape[1].node.expr): "T"}
    for node in holders:
        for d in node.meta["val"].shape:
            for s in d.node.expr.free_symbols if isinstance(d, torch.SymInt) else ():
                symbols.setdefault(s.name, f"D_{s.name}")
    dims = dict.fromkeys(symbols.values(), (1, 4096))
    group = StateGroup("slots", "slots", CONTEXT, specs)
    config = ModelConfig(layer.heads * layer.value_dim, CONTEXT)
    module = Module({"step": traced}, {}, dims, symbols, config, [group], {"k_0": 1, "v_0": 2})
    for node in buffers:
        name, value = weights[node.name]
        node.replace_all_uses_with(module.weight_node(traced, name, Constant(value)))
        traced.graph.erase_node(node)
    return lower(module)
