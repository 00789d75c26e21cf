"""Measured kernel configurations, made by ``llmopt tune``: one table an architecture, kept in this folder.

A table is ``{"arch": 90, "compilers": {"triton 3.9.0": {kernel: {key: config}}}}``. A key of a linear is
``"bfloat16 MxNxK"``, of one over quantized weights ``"int4g128 MxNxK"`` or what else ``quantized_form`` says, with
``" gated"``, ``" normed"`` or both after it where a gated activation or a norm is joined; ``us`` in a configuration is
its measured time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..eight_bits import ALL_COLUMNS, INTERVAL

Table = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Configurations by kernel, then by key, of one compiler."""

REACH = 2.0
"""How far, in powers of two over both extents of a weight, a measured shape lends its configuration to another."""


class Tuned(NamedTuple):
    """A configuration, a word on where it comes from, and its microseconds (modelled from the measured shape's)."""

    config: dict[str, Any]
    note: str
    us: float


def rows_class(m: int) -> int:
    """Row counts that share tile shapes: 1, up to 64, 128, 256, 512, and more."""
    return next((bound for bound in (1, 64, 128, 256, 512) if m <= bound), 1 << 30)


def linear_key(dtype: str, m: int, n: int, k: int, form: str = "") -> str:
    """Key of a linear of m rows over a weight (n, k)."""
    return f"{dtype} {m}x{n}x{k} {form}".rstrip()


def quantized_form(values: Mapping[str, Any], k: int) -> str:
    """What stands for the dtype in the key of a quantized linear of k columns: "int4g128", or "int8" with one scale a
    channel; "fp8" and, by blocks, "fp8g128"; "mxfp4g32"; "w8a8-fp8" where the input is rounded too, "w8a8-fp8-fast"
    with fast accumulation, "w8a8-fp8-every256" where the tensor cores sum as many columns: none serves another."""
    format, group = values["format"], values["block_k"]
    kind = {"fp8_e4m3": "fp8", "int": f"int{values['bits']}"}.get(format, format)
    kind = f"w8a8-{kind}" if values.get("round") else kind
    if (interval := values.get("interval", INTERVAL)) != INTERVAL:
        kind += "-fast" if interval == ALL_COLUMNS else f"-every{interval}"
    return f"{kind}g{group}" if group < k else kind


def linear_form(values: Mapping[str, Any]) -> str:
    """What a call joins to its linear, as a key says it: "gated", "normed", both or nothing."""
    parts = {"gated": values.get("gate"), "normed": values.get("norm")}
    return " ".join(name for name, part in parts.items() if part is not None)


def floor_us(m: int, n: int, k: int) -> float:
    """What a linear would take at the memory's or the tensor cores' speed, whichever is more: to compare shapes. Tiles
    of more than 64 rows have 128: 192 take what 256 take."""
    rows = m if m <= 64 else -(-m // 128) * 128
    return max(2 * n * k / 4.4e6, 2 * rows * n * k / 0.75e9) + 1


def find_linear(table: Table, kernel: str, dtype: str, m: int, n: int, k: int, form: str = "") -> Tuned | None:
    """The configuration measured for a linear, or for the nearest one within reach."""
    entries = table.get(kernel, {})
    if found := entries.get(linear_key(dtype, m, n, k, form)):
        return Tuned(
            {name: value for name, value in found.items() if name != "us"}, "tuned", found.get("us", floor_us(m, n, k))
        )
    best: tuple[float, str] | None = None
    for key in entries:
        known, extents, *form_of = key.split(" ")
        if known != dtype and not {known, dtype} <= {"bfloat16", "float16"}:
            continue  # these two are of one width: what suits one suits the other
        rows, outs, depth = map(int, extents.split("x"))
        apart = abs(math.log2(outs / n)) + abs(math.log2(depth / k))
        if rows_class(rows) == rows_class(m) and apart <= REACH:
            far = apart + 0.1 * abs(math.log2(rows / m)) + 0.05 * (form_of != form.split())
            best = min(best or (far, key), (far, key))
    if best is None:
        return None
    found, shape = entries[best[1]], best[1].partition(" ")[2]
    rows, outs, depth = map(int, shape.split(" ")[0].split("x"))
    floor = floor_us(m, n, k)
    us = found["us"] * floor / floor_us(rows, outs, depth) if "us" in found else floor
    return Tuned({name: value for name, value in found.items() if name != "us"}, f"as tuned for {shape}", us)
