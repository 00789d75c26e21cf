"""Token windows a model writes itself, for calibration when no text is given."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch

from llmopt.calibration.text import Windows, held_out, split
from llmopt.errors import ResourceError
from llmopt.frontend import Checkpoint, capture
from llmopt.ir.pass_manager import PassContext, PassManager
from llmopt.ir.samples import CPU
from llmopt.lower.lowering import lower
from llmopt.recipe import build_pass
from llmopt.registry import load_executor_module, load_target
from llmopt.runtime.golden import blocks
from llmopt.runtime.philox import uniforms
from llmopt.runtime.protocol import Admission, Executor, SamplingParams, SeqStep, StepBatch
from llmopt.target import LoadOptions

MEMORY_SHARE = 0.8
"""Share of the device's memory the weights may take while the model writes."""


def write_windows(
    checkpoint: Checkpoint,
    tokens: int,
    length: int,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    device: torch.device = CPU,
) -> Windows:
    """About ``tokens`` calibration tokens and an eighth as many held out, sampled from the model at temperature 1.

    Each window starts with a token drawn uniformly. The model runs on the reference target in its checkpoint's dtype,
    its weights in the device's memory. Raises ResourceError when they do not fit.
    """
    size = sum(w.nbytes for w in checkpoint.weights.values())
    memory = memory_of(device)
    if size > MEMORY_SHARE * memory:
        what = f"no text was given, and {size / 1e9:.1f} GB of weights do not fit {memory / 1e9:.1f} GB to write one"
        raise ResourceError(what, where="calibration", hint="give --calibration FILE")
    used, held = held_out(tokens, length)
    count = used + held
    executor = generator(checkpoint, count, length, device)
    vocabulary = executor.limits.vocab_size
    ids = np.empty((count, length + 1), np.int64)
    ids[:, 0] = np.array(uniforms([seed] * count, range(count))) * vocabulary
    admit = tuple(
        Admission(i, ids[i, :1], SamplingParams(temperature=1.0, seed=seed * count + i)) for i in range(count)
    )
    tables = blocks(executor, length)
    for position in range(length):
        rows = tuple(
            SeqStep(i, ids[i, position : position + 1], position, {n: t * count + i for n, t in tables.items()}, True)
            for i in range(count)
        )
        output = executor.collect(executor.submit(StepBatch(rows, admit=admit if position == 0 else ())))
        ids[:, position + 1] = [output.sampled[i].token for i in range(count)]
        progress("calibration text", position + 1, length)
    executor.close()
    return split(torch.from_numpy(ids), held)


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def generator(checkpoint: Checkpoint, sequences: int, length: int, device: torch.device) -> Executor:
    """The checkpoint on the reference target, in the dtype it is stored in."""
    module = capture(checkpoint, None, length, ("*",)).module
    passes = [build_pass("rewrite_kv_cache", {"layout": "paged"}), build_pass("prune_logits")]
    PassManager().run(module, passes, PassContext(load_target("reference").info, torch.float32))
    program = lower(module)
    weights = {name: module.weights[name].tensor(device) for name in program.weights}
    options = LoadOptions(device=str(device), max_sequences=sequences, max_context=length)
    executor: Executor = load_executor_module("reference").ReferenceExecutor(program, weights, options)
    return executor
