"""Which calls of a bucket are joined: golden text of a layer, and what must be left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmopt.program import Function, OpCall, Ref
from llmopt.recipe import load_recipe
from targets.cuda.eight_bits import LINEAR_8, ROUND
from targets.cuda.fusion import ATTENTION, LINEAR, LINEAR_Q, fused
from tests.targets.cuda.models import model

OPS = (ATTENTION, LINEAR)
VIEWS = ("split_with_sizes", "reshape", "transpose", "index_select")


def dims(rows: int) -> dict[str, int]:
    return {"T": rows, "N": rows, "M": rows}


def decode(architecture: str) -> Function:
    return model(architecture).program.functions["decode"]


def text(function: Function) -> list[str]:
    """Calls that move data, with what is joined to them."""
    joined = ("norm", "gate", "residual", "q_norm", "k_norm")
    lines = []
    for call in function.calls:
        name = call.op.split(".")[1]
        if name not in VIEWS:
            parts = [part for part in joined if call.args.get(part) is not None]
            lines.append(" ".join([name, *parts]))
    return lines


LLAMA_LAYER = ["linear norm", "attention", "linear residual", "linear norm gate", "linear residual"]


def test_one_row_of_llama_takes_five_launches_a_layer() -> None:
    expected = ["embedding", "rotary_table", *LLAMA_LAYER, *LLAMA_LAYER, "linear norm"]
    assert text(fused(decode("llama-tied"), dims(1), OPS)) == expected


def test_quantized_linears_join_what_follows_them_and_leave_the_norm() -> None:
    function = model("llama", text=load_recipe("int8-cuda").text).program.functions["decode"]
    layer = ["rms_norm", "linear_q", "attention", "linear_q residual", "rms_norm", "linear_q gate", "linear_q residual"]
    expected = ["embedding", "rotary_table", *layer, *layer, "linear norm"]
    assert text(fused(function, dims(1), (*OPS, LINEAR_Q))) == expected
    for arch, gates in ((90, 0), (80, 2)):  # of many rows only gemm_ring's registers hold gates and ups
        many = text(fused(function, {"T": 128, "N": 128}, (*OPS, LINEAR_Q), arch))
        assert many.count("linear_q gate") == 2 - gates
        assert many.count("gated_activation") == gates


CODED = (*OPS, LINEAR_Q, LINEAR_8)


def test_codes_are_made_where_they_are_read_or_normed() -> None:
    """Rows are rounded where the norm makes them, and after attention and the gate."""
    function = model("llama", text=load_recipe("fp8-cuda").text).program.functions["decode"]
    layer = [
        "norm_round",
        "linear_8",
        "attention",
        "round",
        "linear_8 residual",
        "norm_round",
        "linear_8 gate",
        "round",
    ]
    layer.append("linear_8 residual")
    for rows in (1, 4):
        found = text(fused(function, dims(rows), CODED))
        assert found[: 2 + 2 * len(layer)] == ["embedding", "rotary_table", *layer, *layer]
    many = text(fused(function, dims(32), CODED))
    assert (many.count("norm_round"), many.count("norm_round residual"), many.count("round")) == (1, 3, 4)
    assert "linear_8 residual" not in many


def test_codes_need_tensor_cores_that_multiply_them() -> None:
    for recipe, old in (("fp8-cuda", {"linear_q", "round_activations"}), ("int8-cuda", set())):
        function = model("llama", text=load_recipe(recipe).text).program.functions["decode"]
        lines = set(text(fused(function, dims(4), CODED, 80)))
        assert not any("linear_8" in line or line == "round" for line in lines)
        assert ("round_activations" in lines) == bool(old)


def test_a_rounding_that_something_else_reads_stays() -> None:
    function = model("llama", text=load_recipe("fp8-cuda").text).program.functions["decode"]
    at = next(i for i, call in enumerate(function.calls) if call.op == ROUND)
    (name,) = function.calls[at].outputs
    spy = OpCall("aten.alias.default", {"self": Ref(name)}, ("spy",))
    types = {**function.types, "spy": function.types[name]}
    watched = replace(function, calls=(*function.calls[: at + 1], spy, *function.calls[at + 1 :]), types=types)
    assert text(fused(watched, dims(4), CODED)).count("round_activations") == 1
    assert "round_activations" not in text(fused(function, dims(4), CODED))


def test_a_gate_that_no_linear_takes_is_rounded_with_its_codes() -> None:
    function = model("llama", text=load_recipe("fp8-cuda").text).program.functions["decode"]
    lines = text(fused(function, dims(4), (LINEAR_8,)))
    assert (lines.count("round gate"), lines.count("gated_activation")) == (2, 0)


def test_heads_are_normed_inside_attention() -> None:
    lines = text(fused(decode("qwen3"), dims(1), OPS))
    assert lines.count("attention q_norm k_norm") == 2
    assert "rms_norm" not in lines


def test_every_value_is_made_before_it_is_read() -> None:
    for architecture in ("llama-tied", "qwen3", "gemma2"):
        function = decode(architecture)
        weights = model(architecture).program.weights
        for rows in (1, 4, 128):
            known = {*function.inputs, *weights}
            for call in fused(function, dims(rows), OPS).calls:
                assert set(call.refs()) <= known, call
                known.update(call.outputs)
            assert {*function.outputs, *function.state_outputs.values()} <= known


def test_several_rows_keep_their_norms() -> None:
    lines = text(fused(decode("llama-tied"), dims(4), OPS))
    assert "linear norm" not in lines
    assert lines.count("attention") == 2


def test_a_norm_between_linear_and_addition_stays() -> None:
    lines = text(fused(decode("gemma2"), dims(1), OPS))
    assert "linear residual" not in lines
    assert lines.count("rms_norm") == 4
    assert lines.count("linear norm gate") == 0


@pytest.mark.parametrize("ops", [(), (ATTENTION,), (LINEAR,)])
def test_only_what_kernels_serve_is_joined(ops: tuple[str, ...]) -> None:
    made = {call.op for call in fused(decode("qwen3"), dims(1), ops).calls}
    assert made & {LINEAR, ATTENTION} == set(ops)


def test_a_value_that_something_else_reads_is_not_joined() -> None:
    function = decode("llama-tied")
    at = next(i for i, call in enumerate(function.calls) if call.op == "llmopt.gated_activation")
    x = function.calls[at].args["x"]
    assert isinstance(x, Ref)
    spy = OpCall("aten.alias.default", {"self": x}, ("spy",))
    types = {**function.types, "spy": function.types[x.name]}
    watched = replace(function, calls=(*function.calls[:at], spy, *function.calls[at:]), types=types)
    lines = text(fused(watched, dims(1), OPS))
    assert lines.count("gated_activation") == 1
    assert lines.count("linear norm gate") == 1


def test_ring_states_and_fp32_are_left_alone() -> None:
    function = decode("llama-tied")
    ring = tuple(
        replace(call, args={**call.args, "ring": True}) if call.op == "llmopt.cached_attention" else call
        for call in function.calls
    )
    assert "attention" not in text(fused(replace(function, calls=ring), dims(1), OPS))
    types = {name: replace(kind, dtype="float32") for name, kind in function.types.items()}
    assert not any(line.startswith("linear ") for line in text(fused(replace(function, types=types), dims(1), OPS)))


def test_prefill_joins_gates_and_with_many_rows_additions() -> None:
    extend = model("llama-tied").program.functions["extend"]
    some = text(fused(extend, {**dims(512), "N": 1}, OPS))
    assert some.count("linear gate") == 2
    assert "linear residual" not in some
    many = text(fused(extend, {**dims(2048), "N": 1}, OPS))
    assert (many.count("linear gate"), many.count("linear residual")) == (2, 4)
    assert "linear norm" not in many
    assert "attention" not in many  # keys and values are written before


def test_many_rows_of_codes_leave_additions_to_the_norm() -> None:
    extend = model("llama", text=load_recipe("fp8-cuda").text).program.functions["extend"]
    many = text(fused(extend, {**dims(2048), "N": 1}, CODED))
    assert many.count("linear_8 gate") == 2
    assert many.count("norm_round residual") == 3
    assert "linear_8 residual" not in many
