"""Small modules built by hand, node by node, for tests that need one exact graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import llmopt.ir.ops  # noqa: F401
from llmopt.ir.module import ModelConfig, Module
from llmopt.ir.rewrite import call, results, sweep
from llmopt.ir.weights import Constant

aten: Any = torch.ops.aten
dialect: Any = torch.ops.llmopt


class Builder:
    """Builds the function ``step`` of a module: ``input_ids`` and ``position_ids`` (1, T) exist from the start."""

    def __init__(self, vocab: int = 17, context: int = 64, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(0), dtype
        mode = FakeTensorMode(shape_env=ShapeEnv())
        self.function = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.module = Module({"step": self.function}, {}, {"T": (1, context)}, {}, ModelConfig(vocab, context))
        dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DYNAMIC])
        ids = mode.from_tensor(
            torch.zeros(1, 9, dtype=torch.int64, device="meta"), symbolic_context=dynamic, static_shapes=False
        )
        self.module.symbols[ids.shape[1].node.expr.name] = "T"
        self.ids = self._input("input_ids", ids)
        self.positions = self._input("position_ids", ids)
        self.scope = ""

    def _input(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.function.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def weight(self, name: str, *shape: int, spread: float = 0.3) -> fx.Node:
        """A seeded random weight, made once."""
        if name in self.module.weights:
            return self.module.weight_node(self.function, name)
        value = torch.randn(shape, generator=self.generator).to(self.dtype) * spread
        return self.module.weight_node(self.function, name, Constant(value))

    def call(self, op: Any, *args: Any) -> fx.Node:
        """A typed call at the end of the graph."""
        node = call(self.function, self.module, op, *args)
        node.meta["scope"] = self.scope
        return node

    def split(self, op: Any, *args: Any) -> list[fx.Node]:
        """The results of a call with several."""
        return results(self.function, self.call(op, *args))

    def linear(self, x: fx.Node, name: str, rows: int, bias: bool = False) -> fx.Node:
        """``x @ W.T (+ b)`` with weights ``<name>.weight`` and ``<name>.bias``."""
        operands = [self.weight(f"{name}.weight", rows, int(x.meta["val"].shape[-1]))]
        if bias:
            operands.append(self.weight(f"{name}.bias", rows))
        return self.call(aten.linear.default, x, *operands)

    def embed(self, width: int) -> fx.Node:
        """Embedded input ids (1, T, width)."""
        table = self.weight("embed.weight", self.module.config.vocab_size, width, spread=1.0)
        return self.call(aten.embedding.default, table, self.ids)

    def rms_norm(self, x: fx.Node, name: str, **options: Any) -> fx.Node:
        """``llmopt.rms_norm`` with weight ``<name>.weight``."""
        weight = self.weight(f"{name}.weight", int(x.meta["val"].shape[-1]))
        offset, in_fp32 = options.get("offset", 1.0), options.get("mul_in_fp32", False)
        return self.call(dialect.rms_norm.default, x, weight, 1e-5, offset, in_fp32)

    def heads(self, x: fx.Node, count: int) -> fx.Node:
        """(1, T, count * D) as (1, count, T, D)."""
        width = x.meta["val"].shape[2]
        size = self.call(aten.sym_size.int, x, 1)
        return self.call(
            aten.transpose.int, self.call(aten.view.default, x, [1, size, count, int(width) // count]), 1, 2
        )

    def attention(self, q: fx.Node, k: fx.Node, v: fx.Node, **options: Any) -> fx.Node:
        """``llmopt.attention`` merged to (1, T, H * Dv)."""
        scale, window, softcap = options.get("scale", 0.5), options.get("window", 0), options.get("softcap", 0.0)
        out = self.call(dialect.attention.default, q, k, v, options.get("sinks"), scale, window, softcap)
        heads, width = out.meta["val"].shape[2:]
        size = self.call(aten.sym_size.int, out, 1)
        return self.call(aten.view.default, out, [1, size, int(heads) * int(width)])

    def rotary(self, width: int) -> list[fx.Node]:
        """cos and sin (1, T, width / 2)."""
        inverse = self.weight("rotary.inv_freq", width // 2)
        return self.split(dialect.rotary_table.default, self.positions, inverse, 1.0, None, 1.0, 0, None, self.dtype)

    def finish(self, logits: fx.Node) -> Module:
        """The module, with this one output and without what it does not need."""
        self.function.graph.output((logits,))
        sweep(self.function)
        return self.module


def block(b: Builder, x: fx.Node, layer: int, heads: int = 4, kv_heads: int = 2, **options: Any) -> fx.Node:
    """A pre-norm Llama block; options go to the attention."""
    width = int(x.meta["val"].shape[-1])
    size, path = width // heads, f"layers.{layer}"
    cos, sin = options.pop("rotary")
    b.scope = path
    h = b.rms_norm(x, f"{path}.input_norm")
    b.scope = f"{path}.attn"
    q, k, v = (
        b.heads(b.linear(h, f"{path}.attn.{n}_proj", c * size), c)
        for n, c in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    q, k = (b.call(dialect.rope.default, t, cos, sin, False) for t in (q, k))
    attended = b.linear(b.attention(q, k, v, **options), f"{path}.attn.o_proj", width)
    b.scope = path
    x = b.call(aten.add.Tensor, x, attended)
    h = b.rms_norm(x, f"{path}.mlp_norm")
    b.scope = f"{path}.mlp"
    gate, up = (b.linear(h, f"{path}.mlp.{n}_proj", 2 * width) for n in ("gate", "up"))
    hidden = b.call(aten.mul.Tensor, b.call(aten.silu.default, gate), up)
    down = b.linear(hidden, f"{path}.mlp.down_proj", width)
    b.scope = path
    return b.call(aten.add.Tensor, x, down)


def llama(layers: int = 2, windows: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, **options: Any) -> Module:
    """A tiny Llama; ``windows`` gives the attention window by layer (0: none)."""
    b = Builder(dtype=dtype)
    x, rotary = b.embed(16), b.rotary(4)
    for layer in range(layers):
        window = windows[layer] if layer < len(windows) else 0
        x = block(b, x, layer, rotary=rotary, window=window, **options)
    b.scope = ""
    x = b.rms_norm(x, "norm")
    return b.finish(b.linear(x, "lm_head", b.module.config.vocab_size))
