"""The PTX that turns codes into numbers, which no interpreter runs: evaluated here, instruction by instruction."""

from __future__ import annotations

import re
import struct

import pytest
import torch

from targets.cuda.kernels._dequantize import (
    bytes_of_halfwords,
    e2m1_of_bytes,
    e4m3_as,
    e4m3_of_halfwords,
    nibbles_of_bytes,
    nibbles_of_halfwords,
    signed_bytes_as,
)

TYPES = ["bf16", "fp16"]


def halves(word: int, type_: str) -> list[float]:
    """The two floats in a register."""
    parts = [word & 0xFFFF, word >> 16]
    if type_ == "fp16":
        return [float(struct.unpack("<e", struct.pack("<H", half))[0]) for half in parts]
    return [float(struct.unpack("<f", struct.pack("<I", half << 16))[0]) for half in parts]


def evaluate(ptx: str, source: int, type_: str) -> list[float]:
    """The floats in $0 (and $1) after the instructions; the input register is the one after the outputs."""
    outputs = 2 if "$2" in ptx else 1
    registers = {f"${outputs}": source}
    found: dict[str, list[float]] = {}
    for line in re.split(r";\s*", ptx.replace("{", "").replace("}", "").strip()):
        if not line or ".reg" in line:
            continue
        op, rest = line.split(" ", 1)
        target, *names = [name.strip() for name in rest.split(",")]
        values = [registers[n] if n in registers else int(n, 0) for n in names]
        match op.split("."):
            case ["mov", _]:
                result = values[0]
            case ["shr", _]:
                result = values[0] >> values[1]
            case ["shl", _]:
                result = values[0] << values[1] & 0xFFFFFFFF
            case ["and", _]:
                result = values[0] & values[1]
            case ["xor", _]:
                result = values[0] ^ values[1]
            case ["lop3", _]:
                assert values[3] == (0xF0 & 0xCC) | 0xAA
                result = (values[0] & values[1]) | values[2]
            case ["prmt", _]:
                known = struct.pack("<II", *values[:2])
                result = sum(known[values[2] >> 4 * i & 7] << 8 * i for i in range(4))
            case ["fma", *_]:
                a, b, c = (halves(value, type_) for value in values)
                found[target] = [x * y + z for x, y, z in zip(a, b, c)]
                result = {"bf16": 0x43004300, "fp16": 0x64006400}[type_]
                registers[target] = result
                continue
        registers[target] = result
    return [value for name in sorted(found) for value in found[name]]


@pytest.mark.parametrize("type_", TYPES)
def test_nibbles(type_: str) -> None:
    for word in (0x76543210, 0xFEDCBA98, 0x0F1E2D3C, 0xFFFF0000):
        for part in range(4):
            expected = [(word >> 16 * i + 4 * part & 15) - 8 for i in range(2)]
            assert evaluate(nibbles_of_halfwords(part, type_).value, word, type_) == expected
        for part in range(2):
            expected = [(word >> 8 * i + 4 * part & 15) - 8 for i in range(4)]
            assert evaluate(nibbles_of_bytes(part, type_).value, word, type_) == expected


@pytest.mark.parametrize("type_", TYPES)
def test_every_int8(type_: str) -> None:
    for code in range(256):
        raw = bytes((code, 255 - code, code ^ 0x5A, (3 * code) & 255))
        numbers, word = list(struct.unpack("4b", raw)), int.from_bytes(raw, "little")
        assert evaluate(signed_bytes_as(type_).value, word, type_) == numbers
        for part in range(2):
            assert evaluate(bytes_of_halfwords(part, type_).value, word, type_) == numbers[part::2]


@pytest.mark.parametrize("type_", TYPES)
def test_every_fp8(type_: str) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
    values[0x7F], values[0xFF] = 480.0, -480.0  # NaN, which no weight and no key holds
    for code in range(256):
        raw = bytes((code, 255 - code, code ^ 0x5A, (3 * code) & 255))
        numbers, word = [values[byte] for byte in raw], int.from_bytes(raw, "little")
        assert evaluate(e4m3_as(type_).value, word, type_) == numbers
        for part in range(2):
            assert evaluate(e4m3_of_halfwords(part, type_).value, word, type_) == numbers[part::2]


@pytest.mark.parametrize("type_", TYPES)
def test_every_fp4(type_: str) -> None:
    sizes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = [*sizes, *(-size for size in sizes)]
    for code in range(256):
        raw = bytes((code, 255 - code, code ^ 0x5A, (3 * code) & 255))
        for part in range(2):
            expected = [values[byte >> 4 * part & 15] for byte in raw]
            assert evaluate(e2m1_of_bytes(part, type_).value, int.from_bytes(raw, "little"), type_) == expected


def test_another_order_of_bytes_is_noticed() -> None:
    wrong = signed_bytes_as("bf16").value.replace("0x4342", "0x4243")
    assert evaluate(wrong, 0x04030201, "bf16") != [1, 2, 3, 4]
    wrong = e4m3_as("bf16").value.replace("0x3424", "0x2434")
    assert evaluate(wrong, 0x38404448, "bf16") != [4, 3, 2, 1]
    wrong = e2m1_of_bytes(0, "bf16").value.replace("0x7e807e80", "0x7f007f00")
    assert evaluate(wrong, 0x02020202, "bf16") != [1] * 4
