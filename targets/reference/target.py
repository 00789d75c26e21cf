"""The reference target emits nothing: its executor interprets program.json over the logical weights."""

from __future__ import annotations

from collections.abc import Mapping

from llmopt.errors import ConfigError
from llmopt.program import Program
from llmopt.target import BuildContext, TargetFiles, TargetInfo, WeightReader


class ReferenceTarget:
    """Runs every op, layout, dtype and quantization the IR can express."""

    name = "reference"
    info = TargetInfo(
        name="reference",
        functions=("step",),
        layouts=("paged", "slots", "ring"),
        dtypes=("float32", "bfloat16", "float16"),
        quant_bits=(2, 3, 4, 5, 6, 7, 8),
        quant_experts=True,
        quant_embeddings=True,
        quant_formats=("int", "fp8_e4m3", "mxfp4"),
        activation_formats=("int8", "fp8_e4m3"),
        kv_formats=("int8", "fp8_e4m3"),
    )

    def build(self, program: Program, weights: Mapping[str, WeightReader], ctx: BuildContext) -> TargetFiles:
        """Keep every weight under its program name, unpacked."""
        if ctx.options:
            raise ConfigError(f"target reference takes no options, got {sorted(ctx.options)}", where="target_options")
        return TargetFiles(weights={name: weights[name] for name in program.weights})


TARGET = ReferenceTarget()
