"""One operator of the native library at a time, in a model of its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from llmopt.runtime.executors.onnxruntime_session import runs_here
from targets.onnxruntime.graph import IR_VERSION, NATIVE
from targets.onnxruntime.native import library

Array = npt.NDArray[Any]


@cache
def library_file() -> Path:
    """The library on disk, once a process."""
    path = Path(mkdtemp()) / "kernels.so"
    path.write_bytes(library())
    assert runs_here(path)
    return path


def session(
    op: str,
    inputs: dict[str, Array | None],
    constants: dict[str, Array | None],
    outputs: tuple[int, ...],
    threads: int,
    **attrs: Any,
) -> ort.InferenceSession:
    """A model of one call: ``inputs`` are fed, their shapes open; ``constants`` are initializers; None is absent;
    ``outputs`` are types."""
    tensors = {**inputs, **constants}
    names = [name if value is not None else "" for name, value in tensors.items()]
    while not names[-1]:
        names.pop()
    node = helper.make_node(op, names, [f"y{i}" for i in range(len(outputs))], domain=NATIVE, **attrs)
    fed = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), [f"{n}_{i}" for i in range(v.ndim)])
        for n, v in inputs.items()
        if v is not None
    ]
    made = [helper.make_tensor_value_info(f"y{i}", kind, None) for i, kind in enumerate(outputs)]
    kept = [numpy_helper.from_array(value, name) for name, value in constants.items() if value is not None]
    graph = helper.make_graph([node], "one", fed, made, kept)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(NATIVE, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 4
    settings.register_custom_ops_library(str(library_file()))
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def run(
    op: str,
    inputs: dict[str, Array | None],
    constants: dict[str, Array | None],
    outputs: tuple[int, ...] = (TensorProto.FLOAT,),
    threads: int = 1,
    **attrs: Any,
) -> list[Array]:
    """The outputs of one call."""
    made = session(op, inputs, constants, outputs, threads, **attrs)
    return list(made.run(None, {n: v for n, v in inputs.items() if v is not None}))
