"""The onnxruntime target: emits model.onnx for the CPU and CUDA execution providers, weights beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from llmopt.errors import ConfigError, TargetError
from llmopt.program import Function, Program, Ref, StateGroup
from llmopt.target import BuildContext, TargetFiles, TargetInfo, WeightReader

from . import native as kernels
from . import rules  # noqa: F401  (registers every rule)
from .copier import copy_model
from .emit_attention import LONGEST, SEQUENCE_LENGTHS
from .emitter import Emitter
from .graph import NATIVE, WEIGHTS_FILE

MODEL_FILE, COPY_FILE = "model.onnx", "copy.onnx"
NATIVE_MODEL_FILE, NATIVE_LIBRARY_FILE = "native.onnx", "native-x86_64-linux.so"
PLAIN_MODEL_FILE = "plain.onnx"
"""Attention in standard operators: GroupQueryAttention of the CUDA provider takes no float32."""
ACCURACY_LEVELS = (0, 4)
OPTIONS = ("accuracy_level", "native_kernels")
DERIVED = ("cu_seqlens", "seq_lens")


class OnnxRuntimeTarget:
    """One model for decode and prefill, in up to three forms: onnxruntime's operators; llmopt's kernels where it has
    some; attention in standard operators where the CUDA provider needs that.

    Options: ``accuracy_level``: 0 keeps activations of quantized linears in fp32, 4 quantizes them to int8, which is
    faster and less exact. ``native_kernels``: false leaves out the form with llmopt's kernels.
    """

    name = "onnxruntime"
    info = TargetInfo(
        name="onnxruntime",
        functions=("step",),
        layouts=("slots",),
        dtypes=("float32", "float16"),
        quant_bits=(2, 3, 4, 5, 6, 7, 8),
        kv_formats=("int8",),
        quant_experts=True,
        quant_embeddings=True,
    )

    def build(self, program: Program, weights: Mapping[str, WeightReader], ctx: BuildContext) -> TargetFiles:
        """Emit and check the model. Raises TargetError naming a call it cannot emit, ConfigError for a bad option."""
        check_options(ctx.options)
        level = accuracy_level(ctx.options)
        forms = self.forms(program, weights, level, native_kernels(ctx.options))
        files = {COPY_FILE: copy_model(program)}
        notes: dict[str, object] = {"nodes": len(forms[MODEL_FILE].graph.nodes)}
        if NATIVE_MODEL_FILE in forms:
            files[NATIVE_LIBRARY_FILE] = kernels.library()
            counts = operators(forms[NATIVE_MODEL_FILE], NATIVE)
            notes["native"] = {"compiler": kernels.toolchain(), **dict(sorted(counts.items()))}
        read_by_all = set.intersection(*(set(form.graph.external) for form in forms.values()))
        external = {name: r for name, r in forms[MODEL_FILE].graph.external.items() if name in read_by_all}
        for name, form in forms.items():
            form.graph.embed(external)  # angles of positions, for which other forms have tables
            model = form.graph.model("step", metadata(form))
            check(model)
            files[name] = serialized(model)
        return TargetFiles(files, dict(sorted(external.items())), notes)

    def forms(
        self, program: Program, weights: Mapping[str, WeightReader], level: int, native: bool
    ) -> dict[str, Emitter]:
        """The forms that differ, by file."""
        forms = {MODEL_FILE: self.emit(program, weights, level)}
        if native:
            emitter = self.emit(program, weights, level, native=True)
            if operators(emitter, NATIVE):
                forms[NATIVE_MODEL_FILE] = emitter
        fused = operators(forms[MODEL_FILE])["GroupQueryAttention"]
        if fused and function_dtype(decode_of(program)) == "float32":
            forms[PLAIN_MODEL_FILE] = self.emit(program, weights, level, contrib_attention=False)
        return forms

    def emit(self, program: Program, weights: Mapping[str, WeightReader], level: int, **form: bool) -> Emitter:
        """The whole graph in one form."""
        function = decode_of(program)
        emitter = Emitter(program, function, weights, level, **form)
        declare_inputs(emitter, function, only_slots(program))
        emitter.run()
        declare_outputs(emitter, function)
        emitter.graph.prune()
        return emitter


def operators(form: Emitter, domain: str | None = None) -> Counter[str]:
    """How often the form has each operator (of a domain)."""
    return Counter(node.op_type for node in form.graph.nodes if domain is None or node.domain == domain)


def decode_of(program: Program) -> Function:
    """The function that serves decode and prefill alike."""
    return program.functions[program.entry_points["decode"]]


def metadata(e: Emitter) -> dict[str, str]:
    """What the executor must know: rotary tables to bind, and the dtype of activations."""
    activations = "int8" if e.rounds_activations else function_dtype(e.function)
    return {"llmopt.rotary_tables": json.dumps(e.tables, sort_keys=True), "llmopt.activations": activations}


def serialized(model: onnx.ModelProto) -> bytes:
    """The same bytes for equal models."""
    return bytes(model.SerializeToString(deterministic=True))


def function_dtype(function: Function) -> str:
    """dtype the function computes in: that of its first attention's queries."""
    queries = next(call.args["q"] for call in function.calls if call.op == "llmopt.cached_attention")
    assert isinstance(queries, Ref)
    return function.types[queries.name].dtype


def check_options(options: Mapping[str, object]) -> None:
    """Raises ConfigError for an unknown key."""
    for key in options:
        if key not in OPTIONS:
            close = get_close_matches(key, OPTIONS)
            hint = f"did you mean {close[0]}?" if close else f"the options are {', '.join(OPTIONS)}"
            raise ConfigError(f"unknown option {key!r} of target onnxruntime", where="target_options", hint=hint)


def accuracy_level(options: Mapping[str, object]) -> int:
    """The validated option; raises ConfigError."""
    level = options.get("accuracy_level", 0)
    if isinstance(level, bool) or level not in ACCURACY_LEVELS:
        hint = f"one of {ACCURACY_LEVELS}"
        raise ConfigError(f"accuracy_level {level!r} is not supported", where="target_options", hint=hint)
    assert isinstance(level, int)
    return level


def native_kernels(options: Mapping[str, object]) -> bool:
    """The validated option; raises ConfigError."""
    wanted = options.get("native_kernels", True)
    if not isinstance(wanted, bool):
        raise ConfigError(f"native_kernels {wanted!r} is not true or false", where="target_options")
    return wanted


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
