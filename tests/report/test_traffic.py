"""Bytes of a decode step, counted by hand for a program with one of everything."""

from __future__ import annotations

import pytest

from llmopt.program import Function, OpCall, Program, Ref, StatePlan, TensorType, WeightType
from llmopt.report.traffic import kv_bytes, step_bytes

WEIGHTS = {
    "embed.weight": ((100, 8), "bfloat16"),
    "head.weight": ((100, 8), "float32"),
    "up.weight.codes": ((16, 8), "uint8"),
    "up.weight.scales": ((16, 2), "float32"),
    "up.weight.zeros": ((16, 2), "uint8"),
    "experts.gate_up": ((4, 16, 8), "float32"),
    "experts.down": ((4, 8, 8), "float32"),
}


def attention(window: int) -> OpCall:
    args = {"q": Ref("h"), "k_state": Ref("k"), "v_state": Ref("v"), "window": window, "sink_tokens": 2}
    return OpCall("llmopt.cached_attention", args, ("o",))


def program(tied: bool = False, window: int = 0) -> Program:
    head = "embed.weight" if tied else "head.weight"
    quantized = {n: Ref(f"up.weight.{n}") for n in ("codes", "scales", "zeros")} | {"bits": 4}
    experts = {"index": Ref("i"), "gate_up": Ref("experts.gate_up"), "down": Ref("experts.down")}
    calls = (
        OpCall("aten.embedding.default", {"weight": Ref("embed.weight"), "indices": Ref("input_ids")}, ("e",)),
        attention(window),
        OpCall("llmopt.linear_q", quantized, ("u",)),
        OpCall("llmopt.moe_experts", experts, ("m",)),
        OpCall("aten.linear.default", {"weight": Ref(head)}, ("logits",)),
    )
    types = {
        "k": TensorType(("B", 3, 16, 8), "float16"),
        "v": TensorType(("B", 3, 16, 4), "float16"),
        "i": TensorType(("T", 1), "int64"),
    }
    function = Function("step", ("input_ids", "k", "v"), calls, ("logits",), types)
    weights = {n: WeightType(TensorType(s, d)) for n, (s, d) in WEIGHTS.items()}
    entry = {"decode": "step", "extend": "step"}
    return Program({"step": function}, entry, weights, StatePlan(), {}, 64, 100)


QUANTIZED = 16 * 8 // 2 + 16 * 2 * 4 + 16 * 2 // 2
EXPERT = (16 * 8 + 8 * 8) * 4
TOKEN = 3 * (8 + 4) * 2


@pytest.mark.parametrize("batch", [1, 2, 4, 50])
def test_a_step_reads_the_head_the_chosen_experts_and_rows_of_the_table(batch):
    expected = 100 * 8 * 4 + QUANTIZED + min(batch, 4) * EXPERT + batch * 8 * 2 + batch * 10 * TOKEN
    assert step_bytes(program(), batch, context=10) == expected


def test_a_tied_table_is_read_once_and_whole():
    difference = step_bytes(program(), 1, 10) - step_bytes(program(tied=True), 1, 10)
    assert difference == 100 * 8 * 4 + 8 * 2 - 100 * 8 * 2


@pytest.mark.parametrize("batch", [1, 3])
def test_quantized_experts_count_at_their_packed_width(batch):
    args = {"index": Ref("i"), "gate_up_codes": Ref("experts.codes"), "gate_up_zeros": Ref("experts.zeros"), "bits": 2}
    call = OpCall("llmopt.moe_experts_q", args, ("m",))
    function = Function("step", ("i",), (call,), ("m",), {"i": TensorType(("T", 1), "int64")})
    shapes = {"experts.codes": (4, 16, 8), "experts.zeros": (4, 16, 1)}
    weights = {name: WeightType(TensorType(shape, "uint8")) for name, shape in shapes.items()}
    small = Program({"step": function}, {"decode": "step"}, weights, StatePlan(), {}, 64, 100)
    assert step_bytes(small, batch, context=1) == batch * (16 * 8 + 16) // 4


@pytest.mark.parametrize(("window", "seen"), [(0, 40), (8, 10), (64, 40)])
def test_a_window_bounds_the_kv_read(window, seen):
    assert kv_bytes(program(window=window).functions["step"], context=40) == seen * TOKEN
