"""Attention over states of int8 and FP8 codes, and the writes that make them, against the dialect's reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmopt.ir.ops  # noqa: F401 registers the dialect
from llmopt.ir.feed import poisoned
from llmopt.ir.ops.kv import LARGEST, encode
from llmopt.ir.tolerance import code_step
from targets.cuda.fusion import ATTENTION
from targets.cuda.kernels import attention, rotary
from tests.targets.cuda.kernels.harness import Memory, close, place, run, select
from tests.targets.cuda.kernels.test_attention_kernels import OP, PARTS, SMALL, check, exact, operands
from tests.targets.cuda.kernels.test_fused_attention_kernels import exact as separate
from tests.targets.cuda.kernels.test_fused_attention_kernels import operands as joined

OPS = torch.ops.llmopt
CODES = [torch.int8, torch.float8_e4m3fn]
BF16 = torch.bfloat16
PAIRS = {**PARTS, "TMA": 1}
"""Descriptors of halfwords, where heads have 32 columns or more."""


def coded(v: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A call's states as codes under scales that differ by head; what was NaN holds what no code is."""
    made = dict(v)
    for name in ("k", "v"):
        state = v[f"{name}_state"]
        heads = state.shape[1]
        scale = torch.linspace(2.5, 4.0, heads) / LARGEST[dtype]
        rows = state.transpose(0, 1).flatten(1, 2)
        codes = encode(rows.nan_to_num(0), scale, dtype).view(heads, -1, *state.shape[2:]).transpose(0, 1)
        empty = poisoned(tuple(state.shape), dtype)
        made[f"{name}_state"] = torch.where(state.isnan(), empty.float(), codes.float()).to(dtype)
        made[f"{name}_scale"] = scale
    return made


@pytest.mark.parametrize("dtype", CODES)
def test_prefill_and_decode(dtype: torch.dtype) -> None:
    check(coded(operands([5, 1, 11], [5, 30, 19]), dtype), config=SMALL)
    check(coded(operands([1, 1, 1], [40, 3, 17]), dtype), "decode", PARTS)


@pytest.mark.parametrize("dtype", CODES)
def test_key_tiles_through_descriptors(dtype: torch.dtype) -> None:
    check(coded(operands([5, 20], [33, 20], size=32), dtype), config={**SMALL, "TMA": 1})
    check(coded(operands([1, 1], [60, 33], size=16, d=32, dv=48, window=11), dtype), "decode", PAIRS)
    check(coded(operands([1, 4], [60, 33], size=16, d=48, dv=32, softcap=2.0, sinks=True), dtype), config=PAIRS)
    check(coded(operands([1, 1, 1], [60, 33, 2], size=16, d=32, dtype=torch.float16), dtype), "decode", PAIRS)


@pytest.mark.parametrize("dtype", CODES)
def test_window_sinks_softcap_and_ring(dtype: torch.dtype) -> None:
    check(coded(operands([5, 1], [5, 40], window=8, sink_tokens=3, sinks=True), dtype), config=PARTS)
    check(coded(operands([3, 1], [5, 20], softcap=1.5, dtype=torch.float16), dtype), config=SMALL)
    check(coded(operands([3, 1], [17, 33], ring=True, window=8, size=16, sink_tokens=2), dtype), config=SMALL)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_wrong_scales_are_noticed(name: str, dtype: torch.dtype) -> None:
    v = coded(operands([3], [12]), dtype)
    wrong = {**v, name: v[name].flip(0)}
    tuning = {"attention": {f"bfloat16 extend 3x1 h6/2 d16 kv {str(dtype)[6:]}": SMALL}}
    (out,) = run(attention.KERNEL, OP, wrong, [((1, 3, 6, 16), BF16)], function="extend", tuning=tuning)
    with pytest.raises(AssertionError, match="error"):
        close(out, exact(v), 3)


def same_codes(found: Tensor, expected: Tensor) -> None:
    """Codes where they were written, and poison elsewhere, as the reference left them; or, where the last bit decides a
    tie, the neighbouring code."""
    empty = poisoned((), expected.dtype).float().nan_to_num(-1000)
    a, b = found.float().nan_to_num(-1000), expected.float().nan_to_num(-1000)
    assert torch.equal(a == empty, b == empty)
    step = code_step(expected.dtype)
    limit = LARGEST[expected.dtype] * step if expected.dtype == torch.int8 else b.abs() * step + 2**-9
    assert bool(((a - b).abs() <= limit).all())
    assert float((a != b).float().mean()) < 0.01, "more than ties differ"


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("config", [SMALL, PAIRS])
def test_a_row_that_brings_its_own_key(dtype: torch.dtype, config: dict[str, int]) -> None:
    v = coded(joined([20, 1, 17], norm=True, size=16, d=32, dv=32), dtype)
    expected, k_state, v_state = separate(v)
    tuning = {"attention": {f"bfloat16 decode 3x3 h6/2 d32 kv {str(dtype)[6:]}": config}}
    out, k_found, v_found = run(
        attention.KERNEL, ATTENTION, v, [((1, 3, 6, 32), BF16)], in_place=("k_state", "v_state"), tuning=tuning
    )
    close(out, expected, 3)
    same_codes(k_found, k_state)
    same_codes(v_found, v_state)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", CODES)
def test_rotated_keys_and_values_are_written_as_codes(dtype: torch.dtype, interleaved: bool) -> None:
    random = torch.Generator().manual_seed(3)
    rows, heads, shared, d, f = 5, 6, 2, 24, 8
    q, k, x = (torch.randn(1, n, rows, d, generator=random).to(BF16) * 2 for n in (heads, shared, shared))
    angle = torch.rand(1, rows, f, generator=random) * 6
    scale = torch.tensor([2.0, 3.0]) / LARGEST[dtype]  # some saturate
    slots = torch.tensor([7, 0, -1, 3, 9])
    live, state = slots >= 0, poisoned((3, shared, 4, d), dtype)
    v = {
        "q": q, "k": k, "v": x, "cos": angle.cos().to(BF16), "sin": angle.sin().to(BF16), "k_state": state,
        "v_state": state.clone(), "slot_mapping": slots, "interleaved": interleaved, "k_scale": scale,
        "v_scale": scale.flip(0),
    }  # fmt: skip
    out, *found = run(
        rotary.KERNELS[1], "llmopt.rope_kv_write", v, [((1, heads, rows, d), BF16)], in_place=("k_state", "v_state")
    )
    close(out, OPS.rope(q.float(), v["cos"].float(), v["sin"].float(), interleaved), 2)
    keys = OPS.rope(k, v["cos"], v["sin"], interleaved)
    wanted = OPS.kv_write(state, state, keys[:, :, live], x[:, :, live], slots[live], scale, v["v_scale"])
    for a, b in zip(found, wanted):
        same_codes(a, b)
    names = ("k_state", "v_state", "k", "v", "slot_mapping", "k_scale", "v_scale")
    plain = run(
        rotary.KERNELS[1], "llmopt.kv_write", {n: v[n] for n in names}, in_place=("k_state", "v_state")
    )  # fmt: skip
    expected = OPS.kv_write(state, state, k[:, :, live], x[:, :, live], slots[live], scale, v["v_scale"])
    for a, b in zip(plain, expected):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "no arithmetic before it, no ties"


@pytest.mark.parametrize(
    ("dtype", "arch", "change", "message"),
    [
        (torch.float8_e4m3fn, 80, {}, "sm_80 does not convert to FP8"),
        (torch.int8, 90, {"k_scale": None}, "int8 states with scales"),
    ],
)
def test_refusals(dtype: torch.dtype, arch: int, change: dict[str, Any], message: str) -> None:
    memory = Memory()
    v = coded(operands([1, 1], [20, 9]), dtype) | change
    placed = {name: place(memory, name, value) for name, value in v.items()}
    found = select(attention.KERNEL, OP, placed, [memory.put("out", torch.zeros(1, 2, 6, 16, dtype=BF16))], arch=arch)
    assert isinstance(found, str)
    assert message in found
