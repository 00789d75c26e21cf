"""The llmopt op dialect: schema, fake and reference of each op, one family a file. Importing registers all."""

from llmopt.ir.ops import activation, attention, embedding, kv, linear, moe, norm, rope, rounding

__all__ = ["activation", "attention", "embedding", "kv", "linear", "moe", "norm", "rope", "rounding"]
