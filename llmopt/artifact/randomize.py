"""Which weights a seed can stand in for, and how each is drawn."""

from __future__ import annotations

from collections.abc import Mapping

from llmopt.artifact.dtypes import numpy_dtype
from llmopt.artifact.manifest import Fill, RandomTensor
from llmopt.artifact.tensorfile import nbytes
from llmopt.program import Program, Ref
from llmopt.target import WeightReader

SMALL_BYTES = 64 << 10
"""Tensors up to this size (norms, biases, inverse frequencies) are kept as they are: the model stays sane."""

SPREAD = 0.02
"""Standard deviation of a matrix's entries, transformers' usual ``initializer_range``."""


def randomize(program: Program, readers: Mapping[str, WeightReader]) -> dict[str, RandomTensor]:
    """How to draw every large tensor; those it leaves out must be stored.

    Scales are positive and sized so that dequantized entries have SPREAD; unpacked codes stay below 2^bits;
    packed ones (their type is not the program's) take every byte; zero points stay below 2^bits.
    """
    bits = _code_bits(program)
    found = {}
    for name, reader in sorted(readers.items()):
        if nbytes(reader.type) <= SMALL_BYTES:
            continue
        known = name in program.weights and not name.endswith(".zeros")
        packed = known and program.weights[name].type != reader.type
        if fill := _fill(name, reader.type.dtype, 8 if packed else bits.get(name, 8), bits):
            found[name] = RandomTensor(reader.type.dtype, tuple(int(d) for d in reader.type.shape), fill)
    return found


def _fill(name: str, dtype: str, width: int, bits: Mapping[str, int]) -> Fill | None:
    if name.endswith(".scales"):
        center = SPREAD / 2 ** (_width(name, bits) - 2)
        return ("uniform", 0.5 * center, 1.5 * center)
    match numpy_dtype(dtype).name:
        case "uint8":
            return ("integers", 0, 2**width)
        case "int8" if name.endswith(".codes"):
            return ("integers", -128, 128)
        case "float32" | "float16" | "bfloat16" | "float64":
            return ("normal", 0.0, SPREAD)
        case "float8_e4m3fn":
            return ("normal", 0.0, 64.0)  # times the scale of an 8-bit code: SPREAD
    return None  # other integers are tables: drawing them would point outside


def _width(scales: str, bits: Mapping[str, int]) -> int:
    """Bits of the codes beside ``scales``: ``w.codes`` for ``w.scales``, and for a target's ``w.packed.scales``."""
    stem = scales.removesuffix(".scales")
    while stem:
        if f"{stem}.codes" in bits:
            return bits[f"{stem}.codes"]
        stem = stem.rpartition(".")[0]
    return 8


def _code_bits(program: Program) -> dict[str, int]:
    """Bits of each quantized weight's codes and zeros, from the calls that read them."""
    found: dict[str, int] = {}
    for function in program.functions.values():
        for call in function.calls:
            width = call.args.get("bits")
            for key in ("codes", "zeros"):
                arg = call.args.get(key)
                if isinstance(arg, Ref) and isinstance(width, int):
                    found[arg.name] = width
    return found
