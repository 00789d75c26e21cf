"""The model that copies state slots on the device: ORT's Python API moves memory only by running a graph."""

from __future__ import annotations

from onnx import helper

from llmopt.program import Program

from .graph import IR_VERSION, onnx_type


def copy_model(program: Program) -> bytes:
    """``target = source`` for a block of the states' dtype; the executor binds both to addresses inside the states."""
    dtype = onnx_type(program.states.groups[0].states[0].dtype)
    shape = ["blocks", "heads", "context", "width"]
    source, target = (helper.make_tensor_value_info(name, dtype, shape) for name in ("source", "target"))
    graph = helper.make_graph([helper.make_node("Identity", ["source"], ["target"])], "copy", [source], [target])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=IR_VERSION, producer_name="llmopt"
    )
    return bytes(model.SerializeToString(deterministic=True))
