"""The cuda target: Triton kernels compiled to cubins on any machine, launched through the driver by a plan."""

from __future__ import annotations

from collections.abc import Mapping

from llmopt.errors import TargetError
from llmopt.program import Program
from llmopt.target import BuildContext, TargetFiles, TargetInfo, WeightReader

from .build import build
from .cache import CubinCache
from .eight_bits import FORMATS as ACTIVATION_FORMATS
from .options import clamp, parse_options
from .pack import BITS, FORMATS
from .tuning.measured import linear_us

RUNNABLE = ("paged", "ring")


class CudaTarget:
    """Emits ``launch/sm_<arch>.json`` and ``kernels/sm_<arch>/*.cubin``. No GPU, driver or toolkit is needed."""

    name = "cuda"
    info = TargetInfo(
        name="cuda",
        functions=("decode", "extend"),
        layouts=RUNNABLE,
        dtypes=("bfloat16", "float16"),
        quant_bits=BITS,
        quant_experts=True,
        quant_embeddings=True,
        quant_formats=FORMATS,
        activation_formats=tuple(ACTIVATION_FORMATS),
        kv_formats=("int8", "fp8_e4m3"),
        linear_us=linear_us,
    )

    def build(self, program: Program, weights: Mapping[str, WeightReader], ctx: BuildContext) -> TargetFiles:
        """Plan and compile. Raises ConfigError for a bad option, TargetError naming a call no kernel serves."""
        options = clamp(parse_options(ctx.options), program)
        for group in program.states.groups:
            if group.kind not in RUNNABLE:
                hint = "put rewrite_kv_cache: {layout: paged} in the recipe"
                raise TargetError(f"cuda needs paged or ring states, group {group.name} is {group.kind}", hint=hint)
        return build(program, weights, options, ctx, CubinCache())


TARGET = CudaTarget()
