"""The onnxruntime target: emits model.onnx for the CPU and CUDA execution providers, weights beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from llmopt.errors import ConfigError, TargetError
from llmopt.program import Function, Program, StateGroup
from llmopt.target import BuildContext, TargetFiles, TargetInfo, WeightReader

from . import rules  # noqa: F401  (registers every rule)
from .copier import copy_model
from .emit_attention import LONGEST, SEQUENCE_LENGTHS
from .emitter import Emitter
from .graph import WEIGHTS_FILE

MODEL_FILE, COPY_FILE = "model.onnx", "copy.onnx"
ACCURACY_LEVELS = (0, 4)
DERIVED = ("cu_seqlens", "seq_lens")


class OnnxRuntimeTarget:
    """One model for decode and prefill. Option ``accuracy_level``: 0 keeps activations of quantized linears in
    fp32, 4 lets MatMulNBits quantize them to int8, which is faster and less exact."""

    name = "onnxruntime"
    info = TargetInfo(
        name="onnxruntime",
        functions=("step",),
        layouts=("slots",),
        dtypes=("float32", "float16"),
        quant_bits=(2, 3, 4, 5, 6, 7, 8),
        quant_experts=True,
        quant_embeddings=True,
    )

    def build(self, program: Program, weights: Mapping[str, WeightReader], ctx: BuildContext) -> TargetFiles:
        """Emit and check the model. Raises TargetError naming a call it cannot emit, ConfigError for a bad option."""
        level = accuracy_level(ctx.options)
        function = program.functions[program.entry_points["decode"]]
        group = only_slots(program)
        emitter = Emitter(program, function, weights, level)
        declare_inputs(emitter, function, group)
        emitter.run()
        declare_outputs(emitter, function)
        metadata = {"llmopt.rotary_tables": json.dumps(emitter.tables, sort_keys=True)}
        metadata["llmopt.activations"] = "int8" if emitter.rounds_activations else function_dtype(function)
        model = emitter.graph.model(function.name, metadata)
        check(model)
        files = {MODEL_FILE: model.SerializeToString(deterministic=True), COPY_FILE: copy_model(program)}
        return TargetFiles(files, dict(sorted(emitter.graph.external.items())), {"nodes": len(model.graph.node)})


def function_dtype(function: Function) -> str:
    """dtype the function computes in: that of its states."""
    return function.types[next(iter(function.state_outputs))].dtype


def accuracy_level(options: Mapping[str, object]) -> int:
    """The validated option; raises ConfigError for an unknown key or value."""
    for key in options:
        if key != "accuracy_level":
            close = get_close_matches(key, ["accuracy_level"])
            hint = f"did you mean {close[0]}?" if close else "the only option is accuracy_level"
            raise ConfigError(f"unknown option {key!r} of target onnxruntime", where="target_options", hint=hint)
    level = options.get("accuracy_level", 0)
    if isinstance(level, bool) or level not in ACCURACY_LEVELS:
        hint = f"one of {ACCURACY_LEVELS}"
        raise ConfigError(f"accuracy_level {level!r} is not supported", where="target_options", hint=hint)
    assert isinstance(level, int)
    return level


def only_slots(program: Program) -> StateGroup:
    """The program's state group; raises TargetError unless it is one group of slots."""
    groups = program.states.groups
    if len(groups) != 1 or groups[0].kind != "slots":
        found = ", ".join(g.kind for g in groups) or "none"
        hint = "put rewrite_kv_cache: {layout: slots} in the recipe"
        raise TargetError(f"onnxruntime needs KV states in slots, the program has {found}", hint=hint)
    return groups[0]


def declare_inputs(e: Emitter, function: Function, group: StateGroup) -> None:
    """Graph inputs. Rows come as the program has them; of the sequences' metadata GroupQueryAttention wants
    ``seqlens_k`` (B,) int32, length - 1, and their maximum length ``total_sequence_length`` ()."""
    states = {spec.input for spec in group.states}
    for name in function.inputs:
        kind = function.types[name]
        if name in states:
            shape: tuple[int | str, ...] = ("sequences", kind.shape[1], "context", kind.shape[3])
        elif name in DERIVED or name.startswith(("block_table_", "slot_mapping_")):
            continue
        else:
            shape = kind.shape
        e.values[name] = e.graph.input(name, kind.dtype, shape)
    e.graph.input(SEQUENCE_LENGTHS, "int32", ("sequences",))
    e.graph.input(LONGEST, "int32", ())


def declare_outputs(e: Emitter, function: Function) -> None:
    """Graph outputs: float32 logits, and each state's final version as ``present_<state>``."""
    logits = function.types[function.outputs[0]]
    name = e.cast(e.values[function.outputs[0]], logits.dtype, "float32")
    e.graph.node("Identity", name, outputs=("logits",))
    e.graph.output("logits", "float32", logits.shape)
    for state in function.state_outputs:
        kind = function.types[state]
        e.graph.output(f"present_{state}", kind.dtype, ("sequences", kind.shape[1], "context", kind.shape[3]))


def check(model: onnx.ModelProto) -> None:
    """onnx.checker over the model as it will lie on disk; raises TargetError with the checker's words."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_FILE
        onnx.save_model(model, str(path))
        (path.parent / WEIGHTS_FILE).touch()
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise TargetError(f"the emitted model is not valid ONNX: {error}") from error


TARGET = OnnxRuntimeTarget()
