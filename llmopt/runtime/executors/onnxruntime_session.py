"""Sessions of the onnxruntime executor: providers, weights from the artifact, bindings of a step."""

from __future__ import annotations

import ctypes
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from llmopt.errors import ExecutorError, ResourceError
from llmopt.runtime.protocol import FloatArray, IntArray
from llmopt.target import LoadOptions, WeightStore

if TYPE_CHECKING:
    from llmopt.runtime.executors.onnxruntime_calls import Call
    from llmopt.runtime.executors.onnxruntime_logits import LogitRows
    from llmopt.runtime.executors.onnxruntime_state import SlotStates

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TABLES, ACTIVATIONS = "llmopt.rotary_tables", "llmopt.activations"
MAX_BINDINGS = 64
ERRORS = 3
"""onnxruntime's level of logging: no warnings."""
MINIMUM = (1, 24)
"""GroupQueryAttention of onnxruntime 1.23 silently gets sliding windows wrong (errors of 0.1 to 0.4 on tiny models)."""


def device_of(options: LoadOptions) -> tuple[str, int]:
    """(kind, index) of ``cpu``, ``cuda`` or ``cuda:1``; raises ResourceError for anything else."""
    kind, _, index = options.device.partition(":")
    if kind not in PROVIDERS or (index and not index.isdigit()):
        raise ResourceError(f"onnxruntime has no device {options.device!r}", hint="cpu, cuda or cuda:N")
    return kind, int(index or 0)


def new_session(model: bytes, settings: ort.SessionOptions, options: LoadOptions) -> ort.InferenceSession:
    """A session on the options' device and no other; raises ResourceError when its provider is missing."""
    kind, index = device_of(options)
    provider = PROVIDERS[kind]
    check_version(ort.__version__)
    hint = "pip install 'llmopt[onnxruntime-gpu]' in place of onnxruntime" if kind == "cuda" else None
    if provider not in ort.get_available_providers():
        raise ResourceError(f"this onnxruntime has no {provider}", hint=hint)
    cuda = {"device_id": str(index), "use_tf32": "0"}  # float32 is to be float32: TF32 has 10 bits of mantissa
    chosen = [(provider, cuda)] if kind == "cuda" else [provider]
    settings.log_severity_level = ERRORS
    ort.set_default_logger_severity(ERRORS)
    try:
        session = ort.InferenceSession(model, settings, providers=chosen)
    except Exception as error:  # the binding raises RuntimeError, RuntimeException, Fail, InvalidGraph, …
        raise ExecutorError(f"onnxruntime refused the model: {error}") from error
    if session.get_providers()[0] != provider:
        raise ResourceError(f"{provider} did not start; onnxruntime fell back to the CPU", hint="check its libraries")
    return session


def check_version(version: str) -> None:
    """Raises ResourceError for a version known to compute wrongly."""
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise ResourceError(f"onnxruntime {version} is too old", hint=f"pip install 'onnxruntime>={wanted}'")


def runs_here(library: Path) -> bool:
    """Whether this system and processor run a library of llmopt's kernels (x86-64 Linux with AVX2 and FMA)."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(str(library)).llmopt_supported())


def open_session(
    model: bytes, weights: WeightStore, options: LoadOptions, library: Path | None = None
) -> ort.InferenceSession:
    """The model's session, its weights taken from the store without a copy (prepacked ones are copied once).

    ``library``: llmopt's own operators, where the model has some.
    """
    settings = ort.SessionOptions()
    if library is not None:
        settings.register_custom_ops_library(str(library))
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    names = list(weights.names())
    values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(weights.get(name))) for name in names]
    settings.add_external_initializers(names, values)
    return new_session(model, settings, options)


def rotary_tables(session: ort.InferenceSession, rows: int) -> dict[str, npt.NDArray[Any]]:
    """The model's cos and sin inputs, (rows, F) by position; angles are rounded to fp32 as the program's are."""
    described = json.loads(session.get_modelmeta().custom_metadata_map.get(TABLES, "{}"))
    tables = {}
    for name, table in described.items():
        inv_freq = np.array(table["inv_freq"], np.float32)
        angles = np.arange(rows, dtype=np.float32)[:, None] * inv_freq
        wave = np.cos(angles) if table["function"] == "cos" else np.sin(angles)
        tables[name] = (wave * np.float32(table["scale"])).astype(np.dtype(table["dtype"]))
    return tables


def activations(session: ort.InferenceSession) -> str:
    """dtype of the activations, ``int8`` where quantized linears round them."""
    return str(session.get_modelmeta().custom_metadata_map.get(ACTIVATIONS, "float32"))


class StepContext:
    """Runs calls of the model. Bindings of state addresses are kept by slot range: a call rebinds its rows only.

    ``logits``: where a call's go.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        states: SlotStates,
        tables: dict[str, npt.NDArray[Any]],
        logits: LogitRows,
    ) -> None:
        self.session, self.states, self.logits = session, states, logits
        self.inputs = {i.name for i in session.get_inputs()}
        self.tables = {
            name: ort.OrtValue.ortvalue_from_numpy(table, states.device, states.index) for name, table in tables.items()
        }
        self.rows = max((len(table) for table in tables.values()), default=0)
        self.bindings: dict[tuple[int, int], Any] = {}

    def run(self, call: Call, logit_rows: IntArray) -> FloatArray:
        """Logits (len(logit_rows), vocab) of a call, good until the next step; raises ExecutorError when onnxruntime
        fails."""
        if self.rows and int(call.positions.max()) >= self.rows:
            raise ExecutorError(f"position {call.positions.max()} is past the context of {self.rows - 1}")
        binding = self._binding(call.low, len(call.lengths))
        prunes = "logit_rows" in self.inputs
        wanted = logit_rows if len(logit_rows) else np.zeros(1, np.int64)
        feeds = {
            "input_ids": call.tokens,
            "position_ids": call.positions,
            "rope_lens": call.rope_lens,
            "logit_rows": wanted,
            "seqlens_k": (call.lengths - 1).astype(np.int32),
            "total_sequence_length": np.array(call.lengths.max(), np.int32),
        }
        for name in self.inputs & feeds.keys():
            binding.bind_cpu_input(name, feeds[name])
        count = len(wanted) if prunes else call.tokens.shape[1]
        logits = self.logits.take(count)
        binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # the binding's exceptions have no common base but Exception
            raise ExecutorError(f"onnxruntime failed: {error}") from error
        binding.synchronize_outputs()
        return logits[: len(logit_rows)] if prunes else logits[logit_rows]

    def _binding(self, low: int, count: int) -> Any:
        """The binding of a slot range: states in place as past and present, and the tables."""
        if (low, count) not in self.bindings:
            if len(self.bindings) >= MAX_BINDINGS:
                self.bindings.clear()
            self.bindings[low, count] = self._bind(low, count)
        return self.bindings[low, count]

    def _bind(self, low: int, count: int) -> Any:
        binding, states = self.session.io_binding(), self.states
        dtype = np.dtype(states.dtype)
        for name, shape in states.shapes.items():
            place = (states.device, states.index, dtype, (count, *shape[1:]), states.memory.address(name, low))
            binding.bind_input(name, *place)
            binding.bind_output(f"present_{name}", *place)
        for name, table in self.tables.items():
            binding.bind_ortvalue_input(name, table)
        return binding
