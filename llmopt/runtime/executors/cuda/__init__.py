"""The cuda executor: opens a GPU, checks that the artifact fits it, loads, captures, and runs steps."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from llmopt.artifact.digest import sha256
from llmopt.errors import ArtifactError, LlmoptError
from llmopt.launch import LaunchPlan, plan_file
from llmopt.runtime.executors.cuda.driver import call, check_driver, check_multiprocessors, open_device, pick_arch
from llmopt.runtime.executors.cuda.executor import CudaExecutor
from llmopt.runtime.executors.cuda.gpu import GpuBackend, layout
from llmopt.runtime.executors.cuda.layout import Budget, describe_states, size_blocks, weights_region
from llmopt.runtime.executors.cuda.weights import load_weights
from llmopt.runtime.golden import check_golden
from llmopt.target import LoadOptions

if TYPE_CHECKING:
    from llmopt.artifact import Artifact

log = logging.getLogger("llmopt.cuda")

__all__ = ["CudaExecutor", "load"]


CHECKS_WEIGHTS = True
"""Digests that Artifact.open deferred are checked here, while the weights are copied."""


class Stages:
    """Seconds of each stage of a load, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def end(self, name: str) -> None:
        """Close a stage."""
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now


def load(artifact: Artifact, options: LoadOptions) -> CudaExecutor:
    """The executor of an artifact, its golden tokens reproduced. The last log record carries ``stages`` in seconds.

    Raises ResourceError (no driver or GPU, too old, arch not in the artifact, memory short), ArtifactError, or
    ExecutorError when the device computes the model wrongly.
    """
    stages = Stages()
    notes = artifact.manifest.notes
    device = open_device(options.device)
    check_driver(device.driver, int(notes["cuda"]))
    arch = pick_arch(device.arch, tuple(notes["archs"]))
    stages.end("device")
    plan = LaunchPlan.from_json(artifact.file(plan_file(arch)).read_text("utf-8"))
    check_multiprocessors(device, plan.resident)
    program = plan.stored(artifact.program)
    context = min(options.max_context or program.max_context, program.max_context)
    where = layout(plan, weights_region(program))
    stages.end("plan")
    free, _ = device.free_bytes()
    budget = Budget(where.weights.size, where.arena_bytes, where.input_bytes, free, options.kv_bytes)
    blocks = size_blocks(program.states, budget, options.max_sequences, context)
    log.info("%s, %s", device.name, describe_states(program.states, blocks, context))
    backend = GpuBackend(program, plan, device, where, blocks, lambda name: cubin(artifact, name))
    stages.end("memory")
    try:
        executor = CudaExecutor(program, plan, backend, options.max_sequences, context)
        # On an H200, 16 GB and nine graphs: 1.5 s together; 1.7 s one after the other (graphs 0.29, weights 1.41).
        with ThreadPoolExecutor(1, initializer=lambda: call("cuCtxSetCurrent", device.context)) as background:
            copy = background.submit(
                load_weights, program, artifact.weight_store(), where.weights, backend.weights, device.context,
                options.threads, artifact.unchecked,
            )  # fmt: skip
            backend.capture([i for i in executor.buckets.decode if worth(plan, i, executor)])
            stages.end("graphs")
            copy.result()
        stages.end("weights")
        check_golden(executor, artifact.manifest.golden, dtype=artifact.manifest.dtype)
        stages.end("golden")
    except LlmoptError:
        backend.close()
        raise
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.seconds.items())
    log.info(
        "%.2f GB of weights, %d graphs: %s",
        where.weights.size / 1e9, len(backend.bound), spent, extra={"stages": stages.seconds},
    )  # fmt: skip
    return executor


def worth(plan: LaunchPlan, index: int, executor: CudaExecutor) -> bool:
    """Whether a decode bucket can ever run: the smallest that holds all sequences, and those below it."""
    limit = executor.buckets.pick("decode", *[min(executor.limits.max_sequences, executor.buckets.max_decode)] * 2)
    return plan.buckets[index].dims["N"] <= plan.buckets[limit].dims["N"]


def cubin(artifact: Artifact, name: str) -> bytes:
    """A kernel's machine code, its digest checked as it goes to the device."""
    data = artifact.file(name).read_bytes()
    if (found := sha256(data)) != (expected := artifact.manifest.files[name].sha256):
        raise ArtifactError(f"expected sha256 {expected}, found {found}", where=name)
    return data
