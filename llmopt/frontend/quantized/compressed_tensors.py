"""compressed-tensors (llm-compressor): packed integers, int8 or FP8 weights, by the config's groups of layers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.errors import CheckpointError
from llmopt.frontend.quantized.fp8_blocks import in_blocks
from llmopt.frontend.quantized.layer import FLOATS, Layer, quantized
from llmopt.frontend.quantized.options import Options
from llmopt.frontend.quantized.packing import WORD, Decoded, Scales, unpack
from llmopt.frontend.shards import Stored
from llmopt.ir.dequantized import Repeated
from llmopt.ir.quant import QuantTensor, Scheme
from llmopt.ir.weights import Constant, Weight

METHODS = ("compressed-tensors",)
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Group:
    """How the layers that ``targets`` name are stored."""

    targets: tuple[str, ...]
    format: str
    kind: str
    bits: int
    strategy: str
    group_size: int
    symmetric: bool
    act_order: bool
    block: tuple[int, int]

    def names(self, stem: str) -> bool:
        """Whether a layer belongs to the group: by class (all are Linear), name, or ``re:`` pattern."""
        return any(
            re.match(t.removeprefix("re:"), stem) if t.startswith("re:") else t in ("Linear", stem)
            for t in self.targets
        )


class Reader:
    """Reads, for a weight (N, K): ``.weight_packed`` int32 (N, K·bits/32) and ``.weight_shape``, or ``.weight`` (N, K)
    int8 or float8_e4m3fn; with it ``.weight_scale`` (N, K/g), (N, 1), (1,) or by blocks, ``.weight_zero_point`` when
    not symmetric (packed along N, or int8), ``.weight_g_idx`` (K,) in activation order.

    Integers are stored less 2^(bits-1), packed ones are not. Scales of activations are not read.
    """

    marks = (".weight_packed", ".weight_scale")

    def __init__(self, options: Options) -> None:
        outer = options.one_of("format", FORMATS)
        groups = options.below("config_groups")
        if groups is None:
            raise CheckpointError("config_groups is missing", where=options.where)
        self.groups = [group_of(found, outer) for key in groups.values if (found := groups.below(key)) is not None]

    def read(self, layer: Layer) -> dict[str, Weight]:
        """The layer's weight by name."""
        group = next((g for g in self.groups if g.names(layer.stem)), None)
        if group is None:
            raise CheckpointError(f"no config group names the layer {layer.stem}", where=layer.where)
        if group.kind == "float":
            return {layer.weight: floats(layer, group)}
        return {layer.weight: packed(layer, group) if group.format == "pack-quantized" else plain(layer, group)}


def group_of(options: Options, outer: str) -> Group:
    """A config group. Raises UnsupportedModelError for what is not read, CheckpointError for what is malformed."""
    weights, targets = options.below("weights"), options.any("targets", default=[])
    if weights is None or not isinstance(targets, list):
        raise CheckpointError("the group has no weights or no targets", where=options.where)
    format = options.one_of("format", FORMATS, outer)
    kind = weights.one_of("type", ("int", "float"), "int")
    bits = weights.bits("num_bits", known=(8,) if kind == "float" or format != "pack-quantized" else (2, 4, 8))
    block = weights.any("block_structure", default=[128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise CheckpointError(f"block_structure is {block!r}, two integers are needed", where=weights.where)
    strategy = weights.one_of("strategy", STRATEGIES, "group" if weights.any("group_size") else "tensor")
    if kind == "int" and strategy == "block":
        weights.unsupported("strategy", strategy, STRATEGIES[:3])
    return Group(
        tuple(map(str, targets)),
        format,
        kind,
        bits,
        strategy,
        weights.integer("group_size", default=-1),
        weights.flag("symmetric", True),
        weights.any("actorder") in ("group", True),
        (block[0], block[1]),
    )


def floats(layer: Layer, group: Group) -> Weight:
    """FP8 codes with scales by block, row, tensor or group of columns."""
    codes = layer.get(".weight", (torch.float8_e4m3fn,))
    scales = layer.get(".weight_scale", FLOATS)
    if group.strategy == "block":
        return in_blocks(layer, codes, scales, group.block)
    table, width = by_row(layer, scales, codes.shape, group)
    return quantized(
        layer, codes, QuantTensor(codes, table, None, None, Scheme("fp8_e4m3", 8, 1, width, True, scales.dtype))
    )


def plain(layer: Layer, group: Group) -> Weight:
    """int8 codes, a byte each."""
    stored = layer.get(".weight", (torch.int8,))
    scales = layer.get(".weight_scale", FLOATS)
    table, width = by_row(layer, scales, stored.shape, group)
    codes = Decoded(stored.shape, torch.uint8, lambda a, b: lifted(stored.read(a, b), 8), layer.weight)
    zeros: Weight | None = None
    if not group.symmetric:
        offsets = layer.get(".weight_zero_point", (torch.int8,), scales.shape)
        flat = Decoded(
            (scales.rows, table.shape[1]),
            torch.uint8,
            lambda a, b: lifted(offsets.tensor(), 8).reshape(scales.rows, -1)[a:b],
        )
        zeros = flat if flat.shape == table.shape else Repeated(flat, stored.shape[0], 1, (stored.shape[0], 1))
    scheme = Scheme("int", 8, 1, width, group.symmetric, scales.dtype)
    return quantized(layer, stored, QuantTensor(codes, table, zeros, None, scheme))


def packed(layer: Layer, group: Group) -> Weight:
    """Codes of 2, 4 or 8 bits in int32 words along the input features."""
    each = WORD // group.bits
    words = layer.get(".weight_packed", (torch.int32,))
    shape = layer.get(".weight_shape", (torch.int64, torch.int32), (2,))
    n, k = (int(size) for size in shape.tensor())
    if words.shape != (n, -(-k // each)):
        layer.refuse(words, f"is {list(words.shape)}, {shape.name} asks for {[n, -(-k // each)]}")
    scales = layer.get(".weight_scale", FLOATS)
    table, width = by_row(layer, scales, (n, k), group)
    codes = Decoded((n, k), torch.uint8, lambda a, b: unpack(words.read(a, b), group.bits, 1, k), layer.weight)
    zeros: Weight | None = None
    if not group.symmetric:
        if group.strategy == "tensor":
            layer.refuse(words, "has one zero point a tensor, which is not supported for packed codes")
        points = layer.get(".weight_zero_point", (torch.int32,), (-(-n // each), table.shape[1]))
        zeros = Decoded(table.shape, torch.uint8, lambda a, b: unpack(points.tensor(), group.bits, 0, n)[a:b])
    index = order(layer, k, width, table.shape[1], group)
    scheme = Scheme("int", group.bits, 1, width, group.symmetric, scales.dtype, index is not None)
    return quantized(layer, words, QuantTensor(codes, table, zeros, None if index is None else Constant(index), scheme))


def by_row(layer: Layer, scales: Stored, shape: tuple[int, ...], group: Group) -> tuple[Weight, int]:
    """Scales (N, K/g) and g; one scale a tensor is repeated for each row."""
    if len(shape) != 2:
        layer.refuse(scales, f"belongs to a weight {list(shape)}, not a matrix")
    n, k = shape
    if group.strategy == "tensor":
        if scales.shape not in ((), (1,), (1, 1)):
            layer.refuse(scales, f"is {list(scales.shape)}, one scale a tensor was announced")
        return Repeated(Scales(scales, (1, 1)), n, 1, (n, 1)), k
    width = group.group_size if group.strategy == "group" and group.group_size > 0 else k
    expected = (n, -(-k // width))
    if scales.shape not in (expected, (n,) if expected[1] == 1 else expected):
        layer.refuse(scales, f"is {list(scales.shape)}, its layer asks for {list(expected)}")
    return Scales(scales, expected), width


def order(layer: Layer, k: int, width: int, groups: int, group: Group) -> Tensor | None:
    """g_idx (K,) int32, None when groups follow the order of columns."""
    find = layer.get if group.act_order else layer.find
    stored = find(".weight_g_idx", (torch.int32, torch.int64), (k,))
    if stored is None:
        return None
    index = stored.tensor().to(torch.int32)
    if not bool(((index >= 0) & (index < groups)).all()):
        layer.refuse(stored, f"names groups outside 0..{groups - 1}")
    return None if torch.equal(index, torch.arange(k, dtype=torch.int32) // width) else index


def lifted(values: Tensor, bits: int) -> Tensor:
    """Signed integers as codes from 0."""
    return (values.short() + (1 << (bits - 1))).to(torch.uint8)
