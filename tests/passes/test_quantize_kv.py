"""quantize_kv: scales of what is stored, equal to states of codes in every layout, saturation, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from llmopt.errors import PassError
from llmopt.ir.check import PassChecker
from llmopt.ir.feed import run_sequence
from llmopt.ir.module import Module
from llmopt.ir.ops.kv import LARGEST, decode, encode
from llmopt.ir.ops.rounding import LIMITS
from llmopt.ir.pass_manager import PassManager
from llmopt.ir.tolerance import code_step, row_error, tolerance
from llmopt.ir.verify import verify
from llmopt.ir.weights import Constant, Sliced
from llmopt.lower.lowering import lower
from llmopt.program import Program
from llmopt.target import TargetInfo
from passes.quantize_kv import HEADROOM
from tests.calibration.running import calibrated, windows
from tests.ir.handmade import Builder, aten, dialect, llama
from tests.passes.running import TOKENS, build, context, logits, ops, rewrites, run, text
from tests.passes.test_quantize_activations import grid

BOUND = tolerance(torch.float32, 64, depth=6)
UNIT: tuple[str, dict[str, Any]] = ("quantize_kv", {"scales": "unit"})
LAYOUTS: dict[str, dict[str, Any]] = {
    "paged": {"block_size": 4},
    "slots": {"layout": "slots"},
    "ring": {"layout": "ring", "max_chunk": 6},
    "sinks": {"layout": "ring", "max_chunk": 6, "sinks": 2},
}


def of(format: str) -> tuple[str, dict[str, Any]]:
    return "quantize_kv", {"format": format}


def scaled(module: Module, format: str) -> Module:
    """Codes under scales that fit the values of ``llama``, without a calibration."""
    run(module, ("quantize_kv", {"format": format, "scales": "unit"}))
    for name in [n for n in module.weights if n.endswith("_scale")]:
        module.weights[name] = Constant(torch.tensor([4.0, 5.0]) / LIMITS[format])
    return module


def kept(module: Module) -> dict[str, list[torch.Tensor]]:
    """Keys and values (Hk, T, D) that the attentions of an unquantized module read, window by window."""
    found: dict[str, list[torch.Tensor]] = {}
    nodes = module.functions["step"].graph.find_nodes(op="call_function", target=dialect.attention.default)
    names = {n.args[i].name: f"{n.meta['scope']}.{kind}_scale" for n in nodes for i, kind in ((1, "k"), (2, "v"))}
    for window in windows():
        seen: dict[str, torch.Tensor] = {}
        run_sequence(module, "step", window.tolist(), observe=lambda n, v, s=seen: s.__setitem__(n.name, v))
        for name, scale in names.items():
            found.setdefault(scale, []).append(seen[name][0])
    return found


@pytest.mark.parametrize("format", LIMITS)
def test_the_nearest_code_and_saturation(format: str) -> None:
    dtype = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}[format]
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.01, 1.0, 1e-4])
    found = decode(encode(x, scale, dtype), scale)
    values = grid(format)
    nearest = values[((x / scale[:, None, None])[..., None] - values).abs().argmin(-1)] * scale[:, None, None]
    assert float((found - nearest).abs().max()) <= 1e-6
    assert float(found[2].abs().max()) == pytest.approx(1e-4 * LARGEST[dtype]), "beyond the range"
    assert torch.equal(dialect.round_kv(x[None], scale, format)[0], found)


@pytest.mark.parametrize("format", LIMITS)
def test_scales_are_the_largest_of_the_rotated_keys_and_the_values(format: str, tmp_path: Path) -> None:
    module, exact = llama(1), kept(llama(1))
    calibrated(module, tmp_path, of(format))
    for name, values in exact.items():
        largest = torch.stack([v.abs().amax((1, 2)) for v in values]).amax(0)
        expected = largest * HEADROOM[format] / LIMITS[format]
        torch.testing.assert_close(module.weights[name].tensor(), expected)
    assert sorted(exact) == ["layers.0.attn.k_scale", "layers.0.attn.v_scale"]


@pytest.mark.parametrize(("format", "layout"), [*(("int8", layout) for layout in LAYOUTS), ("fp8_e4m3", "paged")])
def test_states_of_codes_equal_rounded_keys_and_values(format: str, layout: str) -> None:
    module = scaled(llama(2, (0, 5)), format)
    first = 5 if layout == "sinks" else len(TOKENS)
    expected = logits(module)[:first]
    run(module, ("rewrite_kv_cache", LAYOUTS[layout]), "fuse_rope_kv_write")
    found = logits(module, [5, 6, 1, 1, 6, 4])[:first]
    step = code_step(getattr(torch, module.states[0].states[0].dtype))
    assert row_error(found, expected) < BOUND + step
    assert "llmopt.round_kv" not in ops(module)
    exact = logits(llama(2, (0, 5)))[:first]
    assert BOUND < row_error(found, exact) < 0.3


def starved(module: Module) -> None:
    """Keys and values of one layer saturate."""
    name = "layers.0.attn.v_scale"
    module.weights[name] = Constant(module.weights[name].tensor() / 64)


def exchanged(module: Module) -> None:
    """The keys are written under their own scales and read under those of the values."""
    for node in module.functions["step"].graph.find_nodes(op="call_function", target=dialect.cached_attention.default):
        node.update_arg(12, node.args[13])


@pytest.mark.parametrize("wrong", [starved, exchanged])
@pytest.mark.parametrize("format", LIMITS)
def test_wrong_scales_show(format: str, wrong: Callable[[Module], None]) -> None:
    module = scaled(llama(1), format)
    module.weights["layers.0.attn.v_scale"] = Constant(torch.tensor([3.0, 3.0]) / LIMITS[format])
    run(module, "rewrite_kv_cache")
    good = logits(module)
    wrong(module)
    assert row_error(logits(module), good) > 0.05


def test_a_read_without_the_scales_of_the_write_does_not_verify() -> None:
    module = llama(1)
    run(module, UNIT, "rewrite_kv_cache")
    exchanged(module)
    with pytest.raises(PassError, match=r"takes state k_0 with scales .*, not layers\.0\.attn\.k_scale"):
        verify(module)
    module = llama(1)
    run(module, UNIT, "rewrite_kv_cache")
    module.weights["layers.0.attn.k_scale"] = Constant(torch.ones(3))
    with pytest.raises(PassError, match=r"layers\.0\.attn\.k_scale"):
        verify(module)


def test_states_say_where_their_scales_are_and_what_they_take() -> None:
    module, plain = llama(1), llama(1)
    run(module, UNIT, "rewrite_kv_cache")
    run(plain, "rewrite_kv_cache")
    program = Program.from_json(lower(module).to_json())
    assert program == lower(module)
    assert [(s.dtype, s.scales) for s in program.states.groups[0].states] == [
        ("float8_e4m3fn", "layers.0.attn.k_scale"), ("float8_e4m3fn", "layers.0.attn.v_scale")]  # fmt: skip
    assert 4 * program.states.groups[0].block_bytes() == plain.states[0].block_bytes()
    assert program.weights["layers.0.attn.k_scale"].type.dtype == "float32"


def test_a_rank_takes_the_scales_of_its_heads() -> None:
    module = scaled(llama(1), "int8")
    scale = module.weights["layers.0.attn.k_scale"]
    halves = [Sliced(scale, 0, i, i + 1).tensor() for i in range(2)]
    assert torch.equal(torch.cat(halves), scale.tensor())
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    whole = encode(x, scale.tensor(), torch.int8)
    assert torch.equal(torch.cat([encode(x[i : i + 1], half, torch.int8) for i, half in enumerate(halves)]), whole)


def test_unit_scales_are_asked_for() -> None:
    module = llama(2)
    with pytest.raises(PassError, match="no calibration text"):
        run(module, "quantize_kv")
    assert rewrites(module, UNIT) == 2
    assert all(torch.equal(w.tensor(), torch.ones(2)) for n, w in module.weights.items() if n.endswith("_scale"))
    shapes = llama(1)
    ctx = replace(context(), shapes_only=True)
    assert PassManager().run(shapes, [build("quantize_kv")], ctx)[0].rewrites == 1


def test_a_head_that_is_always_zero_has_a_scale(tmp_path: Path) -> None:
    module = llama(1)
    module.weights["layers.0.attn.v_proj.weight"] = Constant(torch.zeros(8, 16))
    calibrated(module, tmp_path, of("int8"), tokens=windows(2, 6))
    assert torch.equal(module.weights["layers.0.attn.v_scale"].tensor(), torch.ones(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_name_the_layer(value: float, tmp_path: Path) -> None:
    module = llama(2)
    weight = module.weights["layers.1.attn.k_proj.weight"].tensor().clone()
    weight[3, 2] = value
    module.weights["layers.1.attn.k_proj.weight"] = Constant(weight)
    with pytest.raises(PassError, match=r"layer layers\.1\.attn: the keys hold NaN or infinity"):
        calibrated(module, tmp_path, of("int8"), tokens=windows(2, 6))


def test_refusals() -> None:
    ctx = replace(context(), target=TargetInfo("t", kv_formats=("int8",)))
    with pytest.raises(PassError, match="target t has no fp8_e4m3 KV states"):
        PassManager().run(llama(1), [build(UNIT)], ctx)
    with pytest.raises(PassError, match="quantize_kv must come before rewrite_kv_cache"):
        run(llama(1), "rewrite_kv_cache", UNIT)
    module = llama(1)
    run(module, "rewrite_kv_cache")
    with pytest.raises(PassError, match="quantize_kv must come before rewrite_kv_cache"):
        run(module, UNIT)


def test_must_not_fire_without_attention() -> None:
    b = Builder()
    module = b.finish(b.linear(b.embed(8), "head", 17))
    assert rewrites(module, UNIT) == 0


def test_later_layers_see_the_rounding_of_earlier_ones(tmp_path: Path) -> None:
    first, alone = llama(2), llama(2)
    calibrated(first, tmp_path, of("int8"))
    exact = kept(alone)["layers.1.attn.k_scale"]
    largest = torch.stack([v.abs().amax((1, 2)) for v in exact]).amax(0) / LIMITS["int8"]
    found = first.weights["layers.1.attn.k_scale"].tensor()
    assert 0 < float(((found - largest) / largest).abs().max()) < 0.1


def test_the_checker_replays_states_of_codes() -> None:
    module, checker = llama(2), PassChecker(TOKENS)
    PassManager(check=checker).run(module, [build(UNIT), build("rewrite_kv_cache")], context())
    assert [drift.bound is None for drift in checker.drifts] == [True, False]


def test_golden_text() -> None:
    b = Builder()
    x = b.embed(8)
    q, k, v = (b.heads(b.linear(x, f"{n}_proj", 8), 2) for n in "qkv")
    out = b.call(dialect.attention.default, q, k, v, None, 0.5, 0, 0.0)
    module = b.finish(b.linear(b.call(aten.flatten.using_ints, out, 2, 3), "head", 17))
    run(module, UNIT)
    rounded = text(module).split("transpose_2 :")[1]
    run(module, "rewrite_kv_cache")
    cached = text(module).split("transpose_2 :")[1]
    assert_expected_inline(
        rounded,
        """\
 f32[1, 2, T, 4] = aten.transpose.int(%view_2, 1, 2)
  %round_kv_0 : f32[1, 2, T, 4] = llmopt.round_kv(%transpose_1, @attention.0.k_scale, fp8_e4m3)
  %round_kv_1 : f32[1, 2, T, 4] = llmopt.round_kv(%transpose_2, @attention.0.v_scale, fp8_e4m3)
  %attention_0 : f32[1, T, 2, 4] = llmopt.attention(%transpose_0, %round_kv_0, %round_kv_1, None, 0.5, 0, 0.0)
  %flatten_0 : f32[1, T, 8] = aten.flatten.using_ints(%attention_0, 2, 3)
  %linear_3 : f32[1, T, 17] = aten.linear(%flatten_0, @head.weight)
  return (%linear_3)
}
""",
    )
    assert_expected_inline(
        cached,
        """\
 f32[1, 2, T, 4] = aten.transpose.int(%view_2, 1, 2)
  %kv_write_0 : (f8e4m3[B_paged, 2, 16, 4], f8e4m3[B_paged, 2, 16, 4]) = llmopt.kv_write(%k_0, %v_0, %transpose_1, %transpose_2, %slot_mapping_paged, @attention.0.k_scale, @attention.0.v_scale)
  %cached_attention_0 : f32[1, T, 2, 4] = llmopt.cached_attention(%transpose_0, %kv_write_0.0, %kv_write_0.1, %block_table_paged, %cu_seqlens, %seq_lens, None, 0.5, 0, 0.0, 0, False, @attention.0.k_scale, @attention.0.v_scale)
  %flatten_0 : f32[1, T, 8] = aten.flatten.using_ints(%cached_attention_0, 2, 3)
  %linear_3 : f32[1, T, 17] = aten.linear(%flatten_0, @head.weight)
  return (%linear_3, %kv_write_0.0, %kv_write_0.1)
}
""",  # noqa: E501
    )
