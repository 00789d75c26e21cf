"""GraphBuilder: appends ONNX nodes and initializers with deterministic names; drops what nothing reads."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from llmopt.errors import TargetError
from llmopt.program import TensorType
from llmopt.target import WeightReader

from .readers import materialize

MICROSOFT = "com.microsoft"
NATIVE = "llmopt"
"""Domain of the operators in native/."""
WEIGHTS_FILE = "weights.safetensors"
IR_VERSION = 11

ONNX_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float64": onnx.TensorProto.DOUBLE,
    "int64": onnx.TensorProto.INT64,
    "int32": onnx.TensorProto.INT32,
    "uint8": onnx.TensorProto.UINT8,
    "int8": onnx.TensorProto.INT8,
    "bool": onnx.TensorProto.BOOL,
}


def onnx_type(dtype: str) -> int:
    """TensorProto element type of a dtype name; raises TargetError for one ONNX Runtime has no kernels for."""
    if dtype not in ONNX_TYPES:
        raise TargetError(f"dtype {dtype} is not supported by onnxruntime", hint=f"supported: {sorted(ONNX_TYPES)}")
    return int(ONNX_TYPES[dtype])


class GraphBuilder:
    """Collects the graph. Weights become initializers whose data lies outside, under the same name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inline: dict[str, onnx.TensorProto] = {}
        self.external: dict[str, WeightReader] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.opset = 23
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._cache: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._count = 0

    def node(self, op: str, *inputs: str, outputs: Sequence[str] = (), domain: str = "", **attributes: Any) -> str:
        """Append a one-output node and return its output; equal pure nodes are emitted once."""
        return self.nodes_out(op, inputs, 1, outputs=outputs, domain=domain, **attributes)[0]

    def nodes_out(
        self, op: str, inputs: Sequence[str], count: int, *, outputs: Sequence[str] = (), domain: str = "", **attrs: Any
    ) -> tuple[str, ...]:
        """Append a node with ``count`` outputs (named by ``outputs`` where given; "" leaves one out)."""
        key = (op, domain, tuple(inputs), count, tuple(sorted((k, str(v)) for k, v in attrs.items())))
        if not outputs and key in self._cache:
            return self._cache[key]
        names = tuple(outputs) or tuple(f"{op}_{self._count}" + (f"_{i}" if count > 1 else "") for i in range(count))
        self._count += 1
        given = {k: v for k, v in attrs.items() if v is not None}
        self.nodes.append(helper.make_node(op, list(inputs), list(names), name=names[0], domain=domain, **given))
        if not outputs:
            self._cache[key] = names
        return names

    def const(self, value: Any, dtype: str = "int64") -> str:
        """A small inline constant; equal ones share an initializer."""
        array: npt.NDArray[Any] = np.asarray(value, np.dtype(dtype))
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"const_{len(self._constants)}"
            self._constants[key] = name
            self.inline[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def weight(self, name: str, reader: WeightReader) -> str:
        """An initializer whose data is the reader's, attached by name when the model is loaded."""
        self.external.setdefault(name, reader)
        return name

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, onnx_type(dtype), list(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, onnx_type(dtype), list(shape)))

    def prune(self) -> None:
        """Drop the nodes, inputs, constants and weights that no output needs."""
        needed = {o.name for o in self.outputs}
        live = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                live.append(node)
        self.nodes = live[::-1]
        self.external = {n: r for n, r in self.external.items() if n in needed}
        self.inputs = [i for i in self.inputs if i.name in needed]
        self.inline = {n: t for n, t in self.inline.items() if n in needed}

    def embed(self, known: Container[str]) -> None:
        """Take in the data of weights outside ``known``: a session refuses to be given what its model does not read."""
        for name in [n for n in self.external if n not in known]:
            self.inline[name] = numpy_helper.from_array(materialize(self.external.pop(name)), name)

    def model(self, name: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """The model of the graph as it is."""
        initializers = [*self.inline.values(), *(external_tensor(n, r.type) for n, r in self.external.items())]
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        if any(node.domain == NATIVE for node in self.nodes):
            opsets.append(helper.make_opsetid(NATIVE, 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="llmopt")
        helper.set_model_props(model, dict(sorted(metadata.items())))
        return model


def external_tensor(name: str, type_: TensorType) -> onnx.TensorProto:
    """A TensorProto that names the artifact's weight file; the executor attaches the bytes by tensor name."""
    tensor = onnx.TensorProto(name=name, data_type=onnx_type(type_.dtype), dims=[int(d) for d in type_.shape])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=WEIGHTS_FILE)
    return tensor
