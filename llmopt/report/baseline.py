"""The fp32 baseline of a checkpoint: captured, given a paged KV cache, run by the reference target in memory."""

from __future__ import annotations

from pathlib import Path

from llmopt.compiler import CompileOptions, pass_context, run_passes
from llmopt.frontend import capture, load_checkpoint
from llmopt.lower.lowering import lower
from llmopt.recipe import parse_recipe
from llmopt.registry import load_executor_module, load_target
from llmopt.runtime.protocol import Executor
from llmopt.target import LoadOptions

RECIPE = """
target: reference
dtype: float32
passes: [{rewrite_kv_cache: {layout: paged}}, prune_logits]
"""


def reference_executor(checkpoint: Path, options: LoadOptions) -> Executor:
    """The reference executor over a checkpoint in fp32, nothing fused or quantized. Needs the compile side.

    Raises what loading and capturing a checkpoint raise.
    """
    recipe = parse_recipe(RECIPE, name="baseline")
    target = load_target(recipe.target)
    captured = capture(load_checkpoint(checkpoint), recipe.torch_dtype, options.max_context, ("*",))
    run_passes(captured, target, recipe, pass_context(target, recipe), CompileOptions(), None)
    weights = {name: weight.tensor() for name, weight in captured.module.weights.items()}
    executor: Executor = load_executor_module("reference").ReferenceExecutor(lower(captured.module), weights, options)
    return executor
