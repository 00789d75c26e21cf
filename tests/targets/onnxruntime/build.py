"""Helpers: an executor from a compiled tiny model, and single functions emitted and run beside torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from llmopt.ir.module import ModelConfig, Module
from llmopt.lower.lowering import lower
from llmopt.lower.readers import to_numpy
from llmopt.program import Program
from llmopt.registry import load_target
from llmopt.runtime.executors.onnxruntime import (
    COPY_FILE,
    NATIVE_LIBRARY_FILE,
    OnnxruntimeExecutor,
    model_file,
)
from llmopt.runtime.executors.onnxruntime_session import runs_here
from llmopt.target import BuildContext, LoadOptions, TargetFiles, WeightReader
from targets.onnxruntime import rules  # noqa: F401
from targets.onnxruntime.emitter import Emitter
from targets.onnxruntime.readers import materialize

OPTIONS = LoadOptions(threads=1, max_sequences=4, max_context=64)


class MemoryStore:
    """A weight store over arrays."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self.arrays = dict(arrays)

    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def get(self, name: str) -> npt.NDArray[Any]:
        return self.arrays[name]

    def dtype(self, name: str) -> str:
        return str(self.arrays[name].dtype)


def build(program: Program, weights: Mapping[str, WeightReader], **options: Any) -> TargetFiles:
    """The target's files."""
    return load_target("onnxruntime").build(program, weights, BuildContext(options))


def executor(
    program: Program,
    weights: Mapping[str, WeightReader],
    load: LoadOptions = OPTIONS,
    form_for: str | None = None,
    **options: Any,
) -> OnnxruntimeExecutor:
    """Build and load, with llmopt's kernels where the build has some for the device; ``form_for``: the device whose
    form of the model is taken, if not the one it runs on."""
    files = build(program, weights, **options)
    store = MemoryStore({name: materialize(reader) for name, reader in files.weights.items()})
    device, library = form_for or load.device, None
    with TemporaryDirectory() as folder:
        if device == "cpu" and NATIVE_LIBRARY_FILE in files.files:
            library = Path(folder) / NATIVE_LIBRARY_FILE
            library.write_bytes(files.files[NATIVE_LIBRARY_FILE])
            assert runs_here(library), "this machine cannot run the kernels"
        model = files.files[model_file(files.files.__contains__, device, library)]
        return OnnxruntimeExecutor(program, model, files.files[COPY_FILE], store, load, library)


def trace(function: Callable[..., Any], *example: torch.Tensor) -> Program:
    """The program of a torch function; every symbolic size of the inputs' axis 1 is the dim ``T``."""
    graph_module = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
    output = next(n for n in graph_module.graph.nodes if n.op == "output")
    if not isinstance(output.args[0], tuple | list):
        output.args = ((output.args[0],),)
    values = [n.meta["val"] for n in graph_module.graph.nodes if n.op == "placeholder"]
    symbols = {s.name: f"D_{s.name}" for v in values for d in v.shape if isinstance(d, torch.SymInt)
               for s in d.node.expr.free_symbols}  # fmt: skip
    module = Module({"step": graph_module}, {}, dict.fromkeys(symbols.values(), (1, 1024)), symbols, ModelConfig(8, 64))
    return lower(module)


def run(program: Program, *inputs: torch.Tensor) -> list[npt.NDArray[Any]]:
    """The program's outputs through its ONNX form on the CPU provider."""
    function = program.functions["step"]
    emitter = Emitter(program, function, {}, 0)
    for name in function.inputs:
        kind = function.types[name]
        emitter.values[name] = emitter.graph.input(name, kind.dtype, kind.shape)
    emitter.run()
    for i, name in enumerate(function.outputs):
        emitter.graph.node("Identity", emitter.values[name], outputs=(f"out_{i}",))
        emitter.graph.output(f"out_{i}", function.types[name].dtype, function.types[name].shape)
    emitter.graph.prune()
    model = emitter.graph.model("step", {})
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    feeds = {n: np.asarray(to_numpy(t)) for n, t in zip(function.inputs, inputs, strict=True)}
    return list(session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()}))
