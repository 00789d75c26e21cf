"""Imports every file of rules, so that the emitter knows them all."""

from . import (
    emit_attention,
    emit_elementwise,
    emit_linear,
    emit_moe,
    emit_norm,
    emit_quantized,
    emit_quantized_embedding,
    emit_quantized_moe,
    emit_reduce,
    emit_rope,
    emit_shape,
)

__all__ = [
    "emit_attention",
    "emit_elementwise",
    "emit_linear",
    "emit_moe",
    "emit_norm",
    "emit_quantized",
    "emit_quantized_embedding",
    "emit_quantized_moe",
    "emit_reduce",
    "emit_rope",
    "emit_shape",
]
