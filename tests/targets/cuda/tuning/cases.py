"""Cases of a small linear for the tuning tests, and a timer that makes its times up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmopt.errors import ExecutorError, ResourceError
from llmopt.launch import Cubin, Launch, Pointer, Scalar, TensorMap
from llmopt.program import OpCall
from targets.cuda.eight_bits import LINEAR_8, NOTHING_JOINED
from targets.cuda.kernel import CallSite, Strided
from targets.cuda.tuning.bundle import Buffer, Bundle, Entry
from targets.cuda.tuning.timing import Timed

COMPILER = "triton 3.9.0"


def dense(name: str, *shape: int) -> Strided:
    """A row-major bfloat16 tensor."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * extent)
    return Strided(name, "bfloat16", shape, tuple(reversed(strides)))


def linear_site(m: int, n: int, k: int, gate: str | None = None) -> CallSite:
    """A joined linear as the planner describes it."""
    values = {
        "input": dense("h", 1, m, k), "weight": dense("w", n, k), "bias": None, "norm": None, "eps": 0.0,
        "offset": 0.0, "gate": gate, "residual": None,
    }  # fmt: skip
    out = dense("y", 1, m, n if gate is None else n // 2)
    return CallSite(OpCall("cuda.linear", {}, ("y",)), {}, values, (out,), {"T": m}, "decode", 90)


def quantized_site(m: int, n: int, k: int, gate: str | None = None) -> CallSite:
    """A joined linear over packed int4 weights in groups of 128."""
    values = {
        "x": dense("h", 1, m, k), "codes": replace(dense("c", n, k // 2), dtype="uint8"),
        "scales": dense("s", k // 128, n), "zeros": None, "bias": None, "g_idx": None, "format": "int", "bits": 4,
        "block_n": 1, "block_k": 128, "norm": None, "eps": 0.0, "offset": 0.0, "gate": gate, "residual": None,
    }  # fmt: skip
    out = dense("y", 1, m, n if gate is None else n // 2)
    return CallSite(OpCall("cuda.linear_q", {}, ("y",)), {}, values, (out,), {"T": m}, "decode", 90)


def codes_site(m: int, n: int, k: int, gate: str | None = None, group: int = 0) -> CallSite:
    """A joined linear over FP8 codes of its input."""
    values = {
        "x": replace(dense("h", 1, m, k), dtype="float8_e4m3fn"),
        "x_scale": replace(dense("t", 1, m), dtype="float32"), "input_scale": None,
        "round": "fp8_e4m3", "codes": replace(dense("c", n, k), dtype="float8_e4m3fn"),
        "scales": dense("s", k // (group or k), n // (group or 1)), "bias": None, "format": "fp8_e4m3", "bits": 8,
        "block_n": group or 1, "block_k": group or k, **NOTHING_JOINED, "gate": gate,
    }  # fmt: skip
    out = dense("y", 1, m, n if gate is None else n // 2)
    return CallSite(OpCall(LINEAR_8, {}, ("y",)), {}, values, (out,), {"T": m}, "decode", 90)


def experts_site(rows: int, experts: int) -> CallSite:
    """A mixture's experts, two for each row."""
    values = {
        "x": dense("h", rows, 256), "index": replace(dense("i", rows, 2), dtype="int64"), "weight": dense("s", rows, 2),
        "gate_up": dense("g", experts, 128, 256), "down": dense("d", experts, 256, 64), "gate_up_bias": None,
        "down_bias": None, "activation": "silu",
    }  # fmt: skip
    call = OpCall("llmopt.moe_experts", {}, ("y",))
    return CallSite(call, {}, values, (dense("y", rows, 256),), {"T": rows}, "decode", 90)


def quantized_experts_site(rows: int, experts: int) -> CallSite:
    """The same over int4 codes in groups of 64."""
    values: dict[str, Any] = {
        name: value for name, value in experts_site(rows, experts).values.items() if name not in ("gate_up", "down")
    }
    for stack, n, k in (("gate_up", 128, 256), ("down", 256, 64)):
        codes = replace(dense(f"{stack}c", experts, n, k // 2), dtype="uint8")
        values |= {f"{stack}_codes": codes, f"{stack}_scales": dense(f"{stack}s", experts, k // 64, n)}
        values |= {f"{stack}_zeros": None, f"{stack}_block_k": 64}
    values |= {"format": "int", "bits": 4, "block_n": 1}
    call = OpCall("llmopt.moe_experts_q", {}, ("y",))
    return CallSite(call, {}, values, (dense("y", rows, 256),), {"T": rows}, "decode", 90)


def entry(key: str, config: dict[str, Any], kernel: str = "gemv") -> Entry:
    """An entry with every kind of operand and buffer."""
    args = (Pointer("out"), Scalar("i32", 7), TensorMap("weight", 0, "bfloat16", (8, 8), (16, 2), (8, 8), 128))
    buffers = {
        "out": Buffer(16, "random", "bfloat16"), "weight": Buffer(128, "pool", "bfloat16"),
        "table": Buffer(8, "data", "int32", (3, 4)), "out/flag": Buffer(4, "zero"),
    }  # fmt: skip
    return Entry("llama", "layer", kernel, key, config, 144, 128, buffers, (Launch("k", (1, 2, 3), args, True, 144),),
                 ("out", "bfloat16", 8))  # fmt: skip


def bundle(folder: Path, *entries: Entry) -> Bundle:
    """A written bundle with one cubin that no GPU would load."""
    made = Bundle(folder, 90, COMPILER, 12)
    made.add_cubin("k", Cubin("cubins/k.cubin", "k", 128, 0, 32, 0), b"cubin")
    made.entries += entries
    made.write()
    return made


class FakeTimer:
    """Takes the time and the error from the configuration; ``fail`` there raises it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def describe(self) -> dict[str, Any]:
        return {"gpu": "fake", "driver": 0, "compiler": COMPILER}

    def time(self, entry: Entry, best: float) -> Timed:
        self.seen.append(best)
        if "fail" in entry.config:
            kind, _, what = entry.config["fail"].partition(": ")
            raise {"executor": ExecutorError, "resource": ResourceError}[kind](what)
        us = float(entry.config["time"])
        return Timed(us, us, us, entry.config.get("error", 0.0))
