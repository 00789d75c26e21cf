"""Tiny models compiled to cuda programs, their plans, and executors over the interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llmopt.ir.pass_manager import PassContext, PassManager, split_at_fork
from llmopt.ir.weights import Constant
from llmopt.launch import LaunchPlan
from llmopt.lower.fork import fork
from llmopt.lower.lowering import lower
from llmopt.lower.readers import Reader, readers
from llmopt.program import Program
from llmopt.recipe import load_recipe, parse_recipe
from llmopt.registry import load_executor_module
from llmopt.runtime.executors.cuda.executor import CudaExecutor
from llmopt.target import LoadOptions
from targets.cuda.build import ArchPlan, kernel_names, persistent, plan_arch
from targets.cuda.kernel import Kernel
from targets.cuda.options import CudaOptions
from targets.cuda.pack import packed, stored
from targets.cuda.plan import place
from targets.cuda.target import TARGET
from tests.captured import captured, checkpoint
from tests.targets.cuda.interpreter import PlanInterpreter

CONTEXT = 64
OPTIONS = CudaOptions(decode_buckets=(1, 4), extend_buckets=(16,), extend_sequences=(1, 8))


@dataclass(frozen=True)
class Model:
    """A lowered model in bfloat16 with its weights."""

    program: Program
    weights: dict[str, Reader]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: reader.weight.tensor() for name, reader in self.weights.items()}


@cache
def model(architecture: str, functions: tuple[str, ...] = TARGET.info.functions, text: str = "") -> Model:
    """A random model of an architecture through the recipe bf16-cuda, or another one's ``text``."""
    return lowered(checkpoint(architecture), text, functions)


def lowered(path: Path, text: str = "", functions: tuple[str, ...] = TARGET.info.functions) -> Model:
    """A checkpoint through the recipe bf16-cuda, or another one's ``text``, in the recipe's dtype."""
    recipe = parse_recipe(text) if text else load_recipe("bf16-cuda")
    context = PassContext(TARGET.info, recipe.torch_dtype)
    module = captured(path, recipe.torch_dtype, CONTEXT)
    common, forked = split_at_fork(recipe.passes)
    PassManager().run(module, common, context)
    fork(module, functions)
    PassManager().run(module, forked, context)
    module.prune_weights()
    module.weights = {name: Constant(weight.tensor()) for name, weight in module.weights.items()}
    program = lower(module)
    return Model(program, readers(program, module.weights))


def planned(
    program: Program, kernels: tuple[Kernel, ...], options: CudaOptions = OPTIONS
) -> tuple[ArchPlan, LaunchPlan]:
    """A program's plan for sm_90 without compiling its kernels."""
    plan = plan_arch(program, 90, options, kernels, {})
    names = kernel_names(plan)
    zero_bytes = max(bucket.zero_bytes for bucket in plan.buckets)
    placed = tuple(place(bucket, zero_bytes, names.__getitem__) for bucket in plan.buckets)
    return plan, LaunchPlan.from_json(LaunchPlan(90, {}, placed, persistent(plan)).to_json())


def interpreted(found: Model, kernels: tuple[Kernel, ...], options: CudaOptions = OPTIONS) -> CudaExecutor:
    """The cuda executor over Triton's interpreter."""
    program, weights = stored(found.program), packed(found.program, found.weights)
    plan, launch_plan = planned(program, kernels, options)
    blocks = {g.name: 4 * g.blocks_for(CONTEXT) for g in program.states.groups}
    backend = PlanInterpreter(program, launch_plan, plan, weights, blocks)
    return CudaExecutor(program, launch_plan, backend, 4, CONTEXT)


def reference(found: Model) -> Any:
    """The reference executor on the same program, bfloat16 too."""
    options = LoadOptions(max_sequences=4, max_context=CONTEXT)
    return load_executor_module("reference").ReferenceExecutor(found.program, found.tensors(), options)
