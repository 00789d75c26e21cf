"""Quantized weights as the cuda kernels read them, and back.

Columns go in chunks, a chunk in parts of consecutive columns. Element i of a chunk holds column i of each part, the
first part in its low bits, so that the same bits of a load's elements are a run of columns, that meets x as it lies.
int4, (N, K / 2) bytes: halfwords of four parts, of chunks of 32 bytes of two. int8, (N, K) bytes, the code less 128,
and FP8: halfwords of two parts, single bytes where no chunk divides K. Halfwords are little-endian. Codes that meet
codes of activations (see eight_bits.py) stay (N, K): int8, the code less 128, or float8_e4m3fn. Scales and zeros are
transposed, (K / block_k, N / block_n), so that a tile of outputs reads its scales of a group in one piece. MXFP4's
E2M1 codes are packed as int4's. Of experts each matrix is stored so, one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llmopt.errors import TargetError
from llmopt.program import OpCall, Program, Ref, TensorType
from llmopt.target import WeightReader

from .eight_bits import QUANTIZED, code_calls

Array = npt.NDArray[Any]
BITS = (4, 8)
FORMATS = ("int", "fp8_e4m3", "mxfp4")
EMBEDDING = "llmopt.embedding_q"
EXPERTS, STACKS = "llmopt.moe_experts_q", ("gate_up", "down")
CHUNKS = (128, 64, 32)
MXFP4_GROUP = 32


def chunk_of(bits: int, group: int, k: int) -> int:
    """Columns of a chunk: what a kernel multiplies at a time. Raises ValueError when none of CHUNKS fits."""
    for chunk in CHUNKS:
        if group % chunk == 0 == k % chunk:
            return chunk
    if group >= k and bits == 8:
        return CHUNKS[0]  # what is past K is masked
    raise ValueError(f"groups of {group} of {k} columns are no multiple of {CHUNKS[-1]}")


def parts_of(bits: int, chunk: int, k: int) -> int:
    """Parts of a chunk, whose codes share an element; one of at least 16 columns, the depth of a product."""
    if bits == 4:
        return 4 if chunk >= 64 else 2
    return 2 if k % chunk == 0 else 1


def pack_codes(codes: Array, bits: int, chunk: int, format: str = "int") -> Array:
    """Codes (…, K) uint8 (or FP8) of some rows as stored: (…, K / 2) or (…, K) uint8."""
    *rows, k = codes.shape
    parts = parts_of(bits, chunk, k)
    codes = codes.view(np.uint8)
    if bits == 8 and format == "int":
        codes = codes ^ np.uint8(128)
    if parts == 1:
        return codes
    pieces = codes.reshape(-1, k // chunk, parts, chunk // parts)
    element = np.dtype(f"<u{bits * parts // 8}")
    joined = np.zeros((len(pieces), k // chunk, chunk // parts), element)
    for part in range(parts):
        joined |= pieces[:, :, part].astype(element) << element.type(bits * part)
    return joined.reshape(*rows, k // parts).view(np.uint8)


def unpack_codes(packed: Array, bits: int, chunk: int, format: str = "int") -> Array:
    """Inverse of pack_codes, as uint8."""
    n, k = len(packed), packed.shape[1] * 8 // bits
    flip = np.uint8(128 if bits == 8 and format == "int" else 0)
    if (parts := parts_of(bits, chunk, k)) == 1:
        return packed ^ flip
    elements = np.ascontiguousarray(packed).view(f"<u{bits * parts // 8}").reshape(n, -1, 1, chunk // parts)
    pieces = [elements >> elements.dtype.type(bits * part) & (1 << bits) - 1 for part in range(parts)]
    codes: Array = np.concatenate(pieces, axis=2).reshape(n, k).astype(np.uint8)
    return codes ^ flip


@dataclass(frozen=True)
class CodesLayout:
    """Packed codes; ``chunk`` as chunk_of says."""

    bits: int
    chunk: int
    format: str = "int"

    def type(self, plain: TensorType) -> TensorType:
        """(…, K · bits / 8) uint8."""
        *rows, k = plain.shape
        return TensorType((*rows, int(k) * self.bits // 8), "uint8")

    def chunks(self, source: WeightReader, max_bytes: int) -> Iterator[Array]:
        """Rows in order, packed while they are read."""
        for rows in source.chunks(max_bytes):
            yield np.ascontiguousarray(pack_codes(rows, self.bits, self.chunk, self.format))


@dataclass(frozen=True)
class SignedLayout:
    """Integers of 8 bits as the tensor cores take them: the code less 128."""

    def type(self, plain: TensorType) -> TensorType:
        """(N, K) int8."""
        return TensorType(plain.shape, "int8")

    def chunks(self, source: WeightReader, max_bytes: int) -> Iterator[Array]:
        """Rows in order."""
        for rows in source.chunks(max_bytes):
            yield (rows ^ np.uint8(128)).view(np.int8)

    def unpack(self, packed: Array) -> Array:
        """The codes again."""
        return packed.view(np.uint8) ^ np.uint8(128)


@dataclass(frozen=True)
class TableLayout:
    """Scales or zeros of a matrix, or of each of a stack, with their groups first."""

    def type(self, plain: TensorType) -> TensorType:
        """(…, K / block_k, N / block_n)."""
        *stack, n, k = plain.shape
        return TensorType((*stack, k, n), plain.dtype)

    def chunks(self, source: WeightReader, max_bytes: int) -> Iterator[Array]:
        """Rows in order, at most ``max_bytes`` at a time (one row at least); the table is small enough to be held."""
        table = np.ascontiguousarray(np.concatenate(list(source.chunks(1 << 30))).swapaxes(-1, -2))
        rows = max(1, max_bytes // table[0].nbytes)
        for start in range(0, len(table), rows):
            yield table[start : start + rows]


Layout = CodesLayout | SignedLayout | TableLayout


@dataclass(frozen=True)
class Packed:
    """A weight read in its layout."""

    source: WeightReader
    layout: Layout

    @property
    def type(self) -> TensorType:
        """What is stored."""
        return self.layout.type(self.source.type)

    def chunks(self, max_bytes: int) -> Iterator[Array]:
        """The stored tensor's rows in order."""
        return self.layout.chunks(self.source, max_bytes)


def layouts(program: Program) -> dict[str, Layout]:
    """The layout of each weight that is stored in another form than the program's.

    Raises TargetError for a quantized weight that no kernel reads.
    """
    found: dict[str, Layout] = {}
    plain = {name for function in program.functions.values() for name in code_calls(function).values()}
    for function in program.functions.values():
        for call in function.calls:
            if call.op in (QUANTIZED, EMBEDDING):
                found |= call_layouts(call, program, plain)
            elif call.op == EXPERTS:
                for stack in STACKS:
                    found |= call_layouts(replace(call, args=of_stack(call.args, stack)), program, ())
    return found


def stored(program: Program) -> Program:
    """The program with its weights' types as they are stored; raises TargetError as ``layouts`` does."""
    changed = {name: layout.type(program.weights[name].type) for name, layout in layouts(program).items()}
    types = {name: replace(program.weights[name], type=kind) for name, kind in changed.items()}
    return replace(program, weights={**program.weights, **types})


def packed(program: Program, weights: Mapping[str, WeightReader]) -> dict[str, WeightReader]:
    """Readers of a program's weights as they are stored; raises TargetError as ``layouts`` does."""
    plain = {name: weights[name] for name in program.weights}
    return plain | {name: Packed(weights[name], layout) for name, layout in layouts(program).items()}


def of_stack(args: Mapping[str, Any], stack: str) -> dict[str, Any]:
    """Arguments of a call over experts as a linear's over one of their STACKS."""
    own = {part: args[f"{stack}_{part}"] for part in ("codes", "scales", "zeros", "block_k", "bias")}
    return {**args, **own}


def call_layouts(call: OpCall, program: Program, plain: Collection[str]) -> dict[str, Layout]:
    """How the weights of a quantized linear, or table, are packed; ``plain``: codes that meet codes of activations."""
    args = call.args
    codes, bits, group, format = args["codes"], args["bits"], args["block_k"], args["format"]

    def refuse(what: str, hint: str) -> TargetError:
        return TargetError(f"cuda cannot run {what}", where=call.scope or call.outputs[0], hint=hint)

    if format not in FORMATS or bits not in BITS or (args["block_n"] != 1 and format == "int"):
        what = f"{format} weights of {bits} bits in blocks of {args['block_n']} rows"
        hint = "it has int weights of 4 and 8 bits, a scale for each row and group of columns, FP8 and MXFP4"
        raise refuse(what, hint)
    if format == "mxfp4" and group != MXFP4_GROUP:
        raise refuse(f"MXFP4 weights in groups of {group}", f"the format has groups of {MXFP4_GROUP}")
    if args.get("g_idx") is not None:  # linears alone have one
        raise refuse("columns in another order than their groups (g_idx)", "gptq: {static_groups: true}")
    assert isinstance(codes, Ref)
    assert isinstance(bits, int)
    assert isinstance(group, int)
    try:
        chunk = chunk_of(bits, group, int(program.weights[codes.name].type.shape[-1]))
    except ValueError as error:
        raise refuse(str(error), "use a group_size of 32, 64 or 128, or 8 bits") from error
    tables = [arg.name for arg in (args["scales"], args["zeros"]) if isinstance(arg, Ref)]
    found: dict[str, Layout] = {name: TableLayout() for name in tables}
    if codes.name not in plain:
        found[codes.name] = CodesLayout(bits, chunk, str(format))
    elif format == "int":
        found[codes.name] = SignedLayout()
    return found
