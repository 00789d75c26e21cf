"""Ragged attention over paged and ring states, in tiles and in parts, against the dialect's reference in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmopt.ir.ops  # noqa: F401 registers the dialect
from targets.cuda.kernels import attention
from tests.targets.cuda.kernels.harness import close, run

BF16 = torch.bfloat16
OP = "llmopt.cached_attention"


def operands(
    queries: list[int], lengths: list[int], d: int = 16, dv: int = 16, heads: int = 6, shared: int = 2, size: int = 4,
    window: int = 0, softcap: float = 0.0, sink_tokens: int = 0, ring: bool = False, sinks: bool = False,
    dtype: torch.dtype = BF16,
) -> dict[str, Any]:  # fmt: skip
    """A batch with shuffled blocks; slots that no sequence holds are NaN."""
    random = torch.Generator().manual_seed(sum(lengths) + d)
    rows, n = sum(queries), len(queries)
    width = 1 if ring else max(-(-length // size) for length in lengths)
    blocks = n * width + 1
    table = torch.randperm(blocks, generator=random)[: n * width].view(n, width).to(torch.int32)
    fused = torch.randn(1, rows, heads * d + 5, generator=random).to(dtype)
    q = fused[:, :, : heads * d].view(1, rows, heads, d).transpose(1, 2)
    states = [torch.full((blocks, shared, size, e), float("nan"), dtype=dtype) for e in (d, dv)]
    for i, length in enumerate(lengths):
        for state, e in zip(states, (d, dv)):
            for page in range(width):
                held = min(size, length) if ring else min(size, max(length - page * size, 0))
                state[table[i, page], :, :held] = torch.randn(shared, held, e, generator=random).to(dtype)
    bounds = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    return {
        "q": q, "k_state": states[0], "v_state": states[1], "block_table": table, "cu_seqlens": bounds,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "sinks": torch.randn(heads, generator=random).to(dtype) if sinks else None, "scale": d**-0.5, "window": window,
        "softcap": softcap, "sink_tokens": sink_tokens, "ring": ring,
    }  # fmt: skip


def exact(v: dict[str, Any]) -> Tensor:
    wide = {n: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in v.items()}
    found: Tensor = torch.ops.llmopt.cached_attention(**wide)
    return found


def check(v: dict[str, Any], function: str = "extend", config: dict[str, int] | None = None) -> None:
    _, heads, rows, d = v["q"].shape
    key = f"{str(v['q'].dtype)[6:]} {function} {rows}x{len(v['seq_lens'])} h{heads}/{v['k_state'].shape[1]} d{d}"
    key += f" kv {str(v['k_state'].dtype)[6:]}" if "k_scale" in v else ""
    tuning = {"attention": {key: config}} if config else None
    shape = (1, rows, heads, v["v_state"].shape[3])
    (out,) = run(attention.KERNEL, OP, v, [(shape, v["q"].dtype)], function=function, tuning=tuning)
    live = torch.cat([torch.full((int(b - a),), int(n) > 0) for a, b, n in zip(
        v["cu_seqlens"], v["cu_seqlens"][1:], v["seq_lens"])])  # fmt: skip
    close(out[:, live], exact(v)[:, live], 3)


SMALL = {"BM": 16, "BN": 16, "SPLITS": 1, "warps": 4, "stages": 2, "TMA": 0}
PARTS = {**SMALL, "SPLITS": 4}


@pytest.mark.parametrize("config", [SMALL, PARTS])
def test_mixed_batch(config: dict[str, int]) -> None:
    check(operands([5, 1, 11, 1], [5, 30, 19, 1]), config=config)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("function", ["decode", "extend"])
def test_key_tiles_through_descriptors(splits: int, function: str) -> None:
    queries = [1, 1, 1] if function == "decode" else [5, 1, 40]
    config = {**SMALL, "SPLITS": splits, "TMA": 1}
    check(operands(queries, [60, 33, 40], size=32), function, config)
    check(operands(queries, [60, 33, 40], size=16, d=24, dv=40, window=11), function, config)


def test_chosen_tiles() -> None:
    check(operands([7, 1], [20, 9]))
    check(operands([1, 1], [20, 9], heads=2), "decode")


@pytest.mark.parametrize("config", [SMALL, PARTS])
def test_decode_with_padding_rows(config: dict[str, int]) -> None:
    check(operands([1, 1, 1, 1], [40, 3, 17, 33]), "decode", config)
    v = operands([1, 1, 1], [40, 3, 17])
    v["seq_lens"][1] = 0
    check(v, "decode", config)


def test_padding_sequences_of_extend() -> None:
    check(operands([5, 3, 0, 0], [9, 3, 0, 0]), config=SMALL)


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (96, 32), (128, 128), (192, 128), (256, 256)])
def test_head_sizes(d: int, dv: int) -> None:
    check(operands([3, 1], [9, 20], d=d, dv=dv, heads=2, shared=1), config=SMALL)


@pytest.mark.parametrize("groups", [(1, 1), (7, 1), (8, 8), (40, 2)])
def test_head_groups(groups: tuple[int, int]) -> None:
    heads, shared = groups
    config = {**SMALL, "BM": max(16, 1 << (heads // shared - 1).bit_length())}
    check(operands([3, 1], [9, 20], heads=heads, shared=shared), config=config)


@pytest.mark.parametrize("config", [SMALL, PARTS])
@pytest.mark.parametrize("sink_tokens", [0, 3])
def test_window(config: dict[str, int], sink_tokens: int) -> None:
    check(operands([5, 1, 20], [5, 60, 70], window=8, sink_tokens=sink_tokens), config=config)
    check(operands([1, 1], [60, 7], window=20, sink_tokens=sink_tokens), "decode", config)


def test_sinks_and_softcap() -> None:
    check(operands([5, 1], [5, 30], sinks=True), config=PARTS)
    check(operands([5, 1], [5, 30], softcap=1.5), config=SMALL)


@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_ring(sink_tokens: int) -> None:
    more = {"ring": True, "window": 8, "size": 16, "sink_tokens": sink_tokens}
    for lengths in ([5, 16, 40], [3, 17, 33]):
        check(operands([3, 1, 5], lengths, **more), config=SMALL)
        check(operands([1, 1, 1], lengths, **more), "decode", PARTS)


def test_half_precision() -> None:
    check(operands([5, 1], [5, 30], dtype=torch.float16), config=SMALL)


def test_a_wrong_length_is_noticed() -> None:
    v = operands([1, 1], [20, 9])
    (out,) = run(attention.KERNEL, OP, v, [((1, 2, 6, 16), BF16)], function="decode")
    v["seq_lens"][0] -= 1
    with pytest.raises(AssertionError, match="error"):
        close(out, exact(v), 3)
