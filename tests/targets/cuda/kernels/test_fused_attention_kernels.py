"""``cuda.attention``: heads normed and rotated, key and value written, and attention, in one; against the dialect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmopt.ir.ops  # noqa: F401 registers the dialect
from targets.cuda.fusion import ATTENTION
from targets.cuda.kernels import attention
from tests.targets.cuda.kernels.harness import close, run
from tests.targets.cuda.kernels.test_attention_kernels import PARTS, SMALL
from tests.targets.cuda.kernels.test_attention_kernels import operands as cached

BF16 = torch.bfloat16
OPS = torch.ops.llmopt


def operands(
    lengths: list[int], d: int = 16, dv: int = 16, heads: int = 6, shared: int = 2, rotated: int | None = None,
    interleaved: bool = False, norm: bool = False, offset: float = 0.0, mul_in_fp32: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A decode step; the slot of each row's own key is still NaN. Length 0: a padding row, slot -1."""
    v = cached([1] * len(lengths), lengths, d, dv, heads, shared, **more)
    random = torch.Generator().manual_seed(len(lengths) + d)
    rows, (_, _, size, _) = len(lengths), v["k_state"].shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(v["q"].dtype)

    slots = []
    for i, length in enumerate(lengths):
        page, at = divmod(length - 1, size)
        slots.append(-1 if length == 0 else int(v["block_table"][i, page]) * size + at)
        if length:
            for name in ("k_state", "v_state"):
                v[name][v["block_table"][i, page], :, at] = float("nan")
    f = d // 2 if rotated is None else rotated // 2
    angle = torch.rand(1, rows, f, generator=random) * 6
    fused = draw(1, rows, shared * (d + dv) + 3)
    return {
        **v,
        "k": fused[:, :, : shared * d].view(1, rows, shared, d).transpose(1, 2),
        "v": fused[:, :, shared * d : shared * (d + dv)].view(1, rows, shared, dv).transpose(1, 2),
        "cos": angle.cos().to(v["q"].dtype), "sin": angle.sin().to(v["q"].dtype),
        "slot_mapping": torch.tensor(slots), "interleaved": interleaved,
        "q_norm": draw(d) if norm else None, "k_norm": draw(d) if norm else None, "eps": 1e-3, "offset": offset,
        "mul_in_fp32": mul_in_fp32,
    }  # fmt: skip


def exact(v: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The separate calls: heads as the dialect rounds them, attention in fp32."""
    heads = {}
    for name in ("q", "k"):
        norm = v[f"{name}_norm"]
        normed = v[name] if norm is None else OPS.rms_norm(v[name], norm, v["eps"], v["offset"], v["mul_in_fp32"])
        heads[name] = OPS.rope(normed, v["cos"], v["sin"], v["interleaved"])
    live = v["slot_mapping"] >= 0
    rows = heads["k"][:, :, live], v["v"][:, :, live]
    scales = [v[name] for name in ("k_scale", "v_scale") if name in v]
    k_state, v_state = OPS.kv_write(v["k_state"], v["v_state"], *rows, v["slot_mapping"][live], *scales)
    names = ("block_table", "cu_seqlens", "seq_lens", "sinks", "scale", "window", "softcap", "sink_tokens", "ring")
    more = {name: v[name] for name in names}
    more["sinks"] = None if v["sinks"] is None else v["sinks"].float()
    more |= dict(zip(("k_scale", "v_scale"), scales))
    out = OPS.cached_attention(heads["q"].float(), k_state.float(), v_state.float(), **more)
    return out, k_state, v_state


def check(v: dict[str, Any], config: dict[str, int] | None = None) -> None:
    _, heads, rows, d = v["q"].shape
    key = f"{str(v['q'].dtype)[6:]} decode {rows}x{rows} h{heads}/{v['k_state'].shape[1]} d{d}"
    tuning = {"attention": {key: config}} if config else None
    shape = (1, rows, heads, v["v_state"].shape[3])
    expected, k_state, v_state = exact(v)
    out, k_found, v_found = run(
        attention.KERNEL, ATTENTION, v, [(shape, v["q"].dtype)], in_place=("k_state", "v_state"), tuning=tuning
    )
    live = v["seq_lens"] > 0
    close(out[:, live], expected[:, live], 3)
    assert torch.equal(v_found.nan_to_num(7), v_state.nan_to_num(7))
    written = ~k_state.isnan()
    assert torch.equal(written, ~k_found.isnan())
    close(k_found[written], k_state[written], 1)


@pytest.mark.parametrize("config", [None, SMALL, PARTS, {**PARTS, "AHEAD": 4}])
def test_rows_of_several_lengths(config: dict[str, int] | None) -> None:
    check(operands([40, 1, 17, 33, 2]), config)
    check(operands([40, 0, 17, 1]), config)


@pytest.mark.parametrize("splits", [1, 4])
def test_key_tiles_through_descriptors(splits: int) -> None:
    config = {**SMALL, "SPLITS": splits, "TMA": 1}
    check(operands([60, 33, 40, 1, 32], size=32), config)
    check(operands([60, 33, 40], size=16, d=24, dv=40, window=11), config)


@pytest.mark.parametrize("norm", [{}, {"mul_in_fp32": True, "offset": 1.0}, {"offset": 0.0}])
@pytest.mark.parametrize("interleaved", [False, True])
def test_normed_heads(interleaved: bool, norm: dict[str, Any]) -> None:
    check(operands([20, 9], norm=bool(norm), interleaved=interleaved, **norm), SMALL)
    check(operands([20, 9], d=24, dv=8, rotated=8, norm=bool(norm), interleaved=interleaved, **norm), SMALL)


@pytest.mark.parametrize("groups", [(1, 1), (7, 1), (16, 2)])
def test_head_groups(groups: tuple[int, int]) -> None:
    check(operands([9, 20], heads=groups[0], shared=groups[1]), PARTS)


@pytest.mark.parametrize("config", [SMALL, PARTS])
@pytest.mark.parametrize("sink_tokens", [0, 3])
def test_window(config: dict[str, int], sink_tokens: int) -> None:
    check(operands([60, 7, 1], window=20, sink_tokens=sink_tokens), config)
    check(operands([60, 33], window=1, sink_tokens=sink_tokens), config)


def test_sinks_and_softcap() -> None:
    check(operands([5, 30], sinks=True), PARTS)
    check(operands([5, 30], softcap=1.5), SMALL)


def test_an_unrotated_key_is_noticed() -> None:
    v = operands([20, 9])
    turned = exact(v)
    v["cos"], v["sin"] = torch.ones_like(v["cos"]), torch.zeros_like(v["sin"])
    (out,) = run(attention.KERNEL, ATTENTION, v, [((1, 2, 6, 16), BF16)])
    with pytest.raises(AssertionError, match="error"):
        close(out, turned[0], 3)
