"""Quantized tensors: round-to-nearest against the definition, streaming, parts and shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmopt.errors import CheckpointError
from llmopt.ir import quant
from llmopt.ir.ops.linear import dequantize
from llmopt.ir.quant import QuantTensor, RoundToNearest, Scheme
from llmopt.ir.weights import Concat, Constant, Sliced, Weight
from llmopt.program import WeightPart


@dataclass(frozen=True)
class Named(Weight):
    """A tensor that says which checkpoint tensor it is and counts the elements read."""

    value: Tensor
    name: str = "w"
    reads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.value.shape))
        object.__setattr__(self, "dtype", self.value.dtype)

    def read(self, start: int, stop: int) -> Tensor:
        self.reads.append(self.value[start:stop].numel())
        return self.value[start:stop]

    def parts(self) -> tuple[WeightPart, ...]:
        return (WeightPart(self.name, 0, self.rows),)


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def simulate(w: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """The rounding by its definition, one group after the other, in plain Python of a few lines."""
    out = torch.empty_like(w, dtype=torch.float32)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], group):
            x = w[row, start : start + group].float()
            if symmetric:
                scale, zero = x.abs().max() / 2 ** (bits - 1), 0.0
                low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            else:
                bottom, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
                scale = torch.tensor((top - bottom) / (2**bits - 1))
                zero, low, high = float(torch.round(-bottom / scale)), 0, 2**bits - 1
            out[row, start : start + group] = ((x / scale).round() + zero).clamp(low, high).sub(zero) * scale
    return out


def quantized(w: Tensor, scheme: Scheme) -> QuantTensor:
    return RoundToNearest("w", Constant(w), scheme).tensor()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, 128), (4, 32), (4, 64), (3, 32), (2, 128)])
def test_round_to_nearest_is_its_definition(bits: int, group: int, symmetric: bool) -> None:
    w = matrix(24, 128)
    w[3] = 0.0  # a row without a scale
    w[4] = w[4].abs()  # a range that does not straddle 0
    found = quantized(w, Scheme("int", bits, 1, group, symmetric)).dequantize()
    expected = simulate(w, bits, group, symmetric)
    expected[3] = 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    wrong = simulate(w, bits, group, not symmetric)
    assert float((found - wrong).abs().nan_to_num(1.0).max()) > 1e-3


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    block_n=st.sampled_from([1, 2, 3]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    pieces=st.integers(1, 200),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_streaming_and_shards_change_nothing(
    rows: int, groups: int, block_n: int, bits: int, symmetric: bool, dtype: Any, pieces: int, data: st.DataObject
) -> None:
    rows *= block_n
    w = matrix(rows, groups * 8, dtype=dtype)
    scheme = Scheme("int", bits, block_n, 8, symmetric, dtype)
    whole = quantized(w, scheme)
    expected = whole.dequantize()
    bound = whole.scales.tensor().float().repeat_interleave(block_n, 0).repeat_interleave(8, 1)
    slack = 1.01 if symmetric else 0.51  # the top of a symmetric range is clipped by one step
    slack += 0 if dtype == torch.float32 else 2**bits * 2**-8  # a bf16 scale may not reach the extremes
    assert bool(((expected - w.float()).abs() <= slack * bound + 1e-6).all())
    before, quant.ELEMENTS = quant.ELEMENTS, pieces
    try:
        streamed = quantized(w, scheme)
        for name in ("codes", "scales", "zeros"):
            part, reference = getattr(streamed, name), getattr(whole, name)
            assert (part is None) == (reference is None) == (name == "zeros" and symmetric)
            if part is not None:
                chunks = list(part.chunks(data.draw(st.integers(1, 4 * w.numel()))))
                assert torch.equal(torch.cat(chunks), reference.tensor())
    finally:
        quant.ELEMENTS = before
    axis = data.draw(st.sampled_from([0, 1]))
    block = block_n if axis == 0 else 8
    start = data.draw(st.integers(0, w.shape[axis] // block - 1)) * block
    stop = data.draw(st.integers(start // block + 1, w.shape[axis] // block)) * block
    piece = w.narrow(axis, start, stop - start)
    sharded = whole.shard(axis, start, stop)
    assert torch.equal(sharded.dequantize(), expected.narrow(axis, start, stop - start))
    assert torch.equal(sharded.codes.tensor(), quantized(piece.contiguous(), scheme).codes.tensor())


def test_a_shard_that_cuts_a_block_is_refused() -> None:
    tensor = quantized(matrix(8, 64), Scheme("int", 4, 2, 32))
    for axis, start, stop in ((1, 0, 16), (0, 1, 4)):
        with pytest.raises(ValueError, match="cuts a block"):
            tensor.shard(axis, start, stop)
    with pytest.raises(ValueError, match="lies outside axis"):
        tensor.shard(0, 0, 10)


def test_permuted_columns_keep_their_scales() -> None:
    codes, scales = torch.randint(0, 16, (6, 8), dtype=torch.uint8), matrix(6, 2).abs()
    g_idx = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.int32)
    scheme = Scheme("int", 4, 1, 4, permuted=True)
    tensor = QuantTensor(Constant(codes), Constant(scales), None, Constant(g_idx), scheme)
    expected = (codes.float() - 8) * scales[:, g_idx.long()]
    assert torch.equal(tensor.dequantize(), expected)
    assert torch.equal(tensor.shard(1, 3, 7).dequantize(), expected[:, 3:7])
    assert torch.equal(tensor.shard(0, 2, 5).dequantize(), expected[2:5])
    plain = QuantTensor(tensor.codes, tensor.scales, None, None, Scheme("int", 4, 1, 4))
    assert not torch.equal(plain.dequantize(), expected)


@pytest.mark.parametrize("format", ["fp8_e4m3", "mxfp4"])
def test_float_formats(format: str) -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(4, 4)
    stored = codes if format == "mxfp4" else codes.float().to(torch.float8_e4m3fn)
    bits, scales = (4 if format == "mxfp4" else 8), matrix(2, 2).abs()
    scheme = Scheme(format, bits, 2, 32)  # type: ignore[arg-type]
    tensor = QuantTensor(Constant(stored), Constant(scales), None, None, scheme)
    flat = dequantize(stored, scales, None, None, format, bits, 2, 32)
    assert torch.equal(tensor.dequantize(), flat)
    assert torch.equal(tensor.shard(1, 32, 64).dequantize(), flat[:, 32:])
    assert scheme.code_dtype == stored.dtype


@pytest.mark.parametrize("block", [(1, 32), (1, 128), (24, 128), (8, 32)])
def test_fp8_rounds_to_the_nearest_representable_value(block: tuple[int, int]) -> None:
    w = matrix(24, 128)
    w[3] = 0.0
    tensor = quantized(w, Scheme("fp8_e4m3", 8, *block))
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].unique()
    for row in range(0, 24, block[0]):
        for column in range(0, 128, block[1]):
            piece = w[row : row + block[0], column : column + block[1]]
            scale = piece.abs().max() / 448 or 1.0
            nearest = grid[((piece / scale)[..., None] - grid).abs().argmin(-1)] * scale
            found = tensor.dequantize()[row : row + block[0], column : column + block[1]]
            off = (piece - found).abs() - (piece - nearest).abs()
            assert float(off.max()) <= 1e-6  # ties may go either way
    coarse = quantized(w, Scheme("int", 4, *block)).dequantize()
    assert float((w - tensor.dequantize()).abs().max()) < float((w - coarse).abs().max())


def test_experts_are_independent_matrices() -> None:
    w = matrix(3, 8, 64)
    whole = quantized(w, Scheme("int", 4, 1, 32, False)).dequantize()
    for e in range(3):
        assert torch.equal(whole[e], quantized(w[e], Scheme("int", 4, 1, 32, False)).dequantize())
    assert torch.equal(quantized(w, Scheme("int", 4, 1, 32)).shard(0, 1, 2).dequantize(),
                       quantized(w[1:2], Scheme("int", 4, 1, 32)).dequantize())  # fmt: skip


def test_parts_survive_fusing_quantizing_and_sharding() -> None:
    fused = Concat((Named(matrix(8, 32), "q"), Named(matrix(4, 32, seed=1), "k")))
    tensor = RoundToNearest("qk", fused, Scheme("int", 4, 1, 32)).tensor()
    assert tensor.parts() == (WeightPart("q", 0, 8), WeightPart("k", 8, 4))
    assert tensor.scales.parts() == tensor.parts()
    assert tensor.shard(0, 6, 10).parts() == (WeightPart("q", 0, 2), WeightPart("k", 2, 2))
    assert Sliced(fused, 1, 0, 8).parts() == fused.parts()


def test_a_writer_measures_the_source_once() -> None:
    source = Named(matrix(64, 128))
    tensor = RoundToNearest("w", source, Scheme("int", 4, 1, 32, False)).tensor()
    for part in (tensor.codes, tensor.scales, tensor.zeros):
        assert part is not None
        list(part.chunks(1000))
    assert sum(source.reads) == source.value.numel()


def test_kept_scales_are_forgotten() -> None:
    sources = [Named(matrix(8, 32, seed=i)) for i in range(quant.RECENT + 2)]
    tensors = [RoundToNearest("w", s, Scheme("int", 4, 1, 32)).tensor() for s in sources]
    expected = [t.scales.tensor() for t in tensors]
    assert torch.equal(tensors[0].scales.tensor(), expected[0])
    assert sum(sources[0].reads) == 2 * sources[0].value.numel()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_their_tensor(value: float) -> None:
    w = matrix(8, 32)
    w[5, 7] = value
    tensor = RoundToNearest("model.layers.0.q", Constant(w), Scheme("int", 4, 1, 32)).tensor()
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.q: weights hold NaN or infinity"):
        tensor.codes.tensor()


def test_tiny_weights_keep_a_scale() -> None:
    w = matrix(4, 32) * 1e-6
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = quantized(w, Scheme("int", 8, 1, 32, scale_dtype=dtype))
        assert bool((tensor.scales.tensor() > 0).all())
        assert float((tensor.dequantize() - w).abs().max()) <= 1.001 * float(tensor.scales.tensor().float().max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("int", 9), "no scheme"), (("mxfp4", 8), "no scheme"), (("fp8_e4m3", 8, 1, 32, False), "no zero points")],
)
def test_schemes_that_do_not_exist(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(*arguments)  # type: ignore[arg-type]


def test_blocks_must_divide() -> None:
    with pytest.raises(ValueError, match="do not divide 8×40"):
        quantized(matrix(8, 40), Scheme("int", 4, 1, 32))
