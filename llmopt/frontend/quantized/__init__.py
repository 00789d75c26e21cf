"""Checkpoints that are already quantized: one file a format, found by ``quant_method``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from llmopt.errors import CheckpointError, UnsupportedModelError
from llmopt.frontend.quantized.layer import Layer
from llmopt.frontend.quantized.options import Options
from llmopt.frontend.shards import Stored
from llmopt.ir.weights import Weight

KEY = "quantization_config"


class Reader(Protocol):
    """A format: made from its options. ``marks``: how names of tensors end by which a quantized layer is known."""

    marks: tuple[str, ...]

    def read(self, layer: Layer) -> dict[str, Weight]:
        """Lazy weights by the names the unquantized checkpoint would give them; nothing large is read.

        Raises CheckpointError naming tensor and file.
        """
        ...


def readers() -> dict[str, Any]:
    """Reader classes by ``quant_method``: every file of this folder that has METHODS."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {method: m.Reader for m in modules for method in getattr(m, "METHODS", ())}


def reader_for(config: Mapping[str, Any], path: Path) -> Reader | None:
    """The format a config names, None without one. Raises UnsupportedModelError or CheckpointError."""
    if config.get(KEY) is None:
        return None
    where = f"{path / 'config.json'}, {KEY}"
    options = Options(config, where).below(KEY)
    assert options is not None
    known = readers()
    method = options.any("quant_method")
    if method not in known:
        raise UnsupportedModelError(
            f"weights quantized by {method!r} are not read", where=where, hint=f"known: {', '.join(sorted(known))}"
        )
    return known[method](Options(options.values, where))  # type: ignore[no-any-return]


def read_quantized(reader: Reader, stored: Mapping[str, Weight], path: Path) -> dict[str, Weight]:
    """The table with the tensors of each quantized layer replaced by its one weight, which reads them."""
    tensors = {name: weight for name, weight in stored.items() if isinstance(weight, Stored)}
    stems = {name.removesuffix(mark): None for name in tensors for mark in reader.marks if name.endswith(mark)}
    if not stems:
        raise CheckpointError(f"no tensor ends in {' or '.join(reader.marks)}", where=str(path), hint=f"{KEY} says so")
    table = dict(stored)
    for stem in stems:
        layer = Layer(stem, tensors, str(path))
        found = reader.read(layer)
        for name in layer.taken:
            table.pop(name, None)
        table |= found
    check_codes(table)
    return table


def check_codes(table: Mapping[str, Weight]) -> None:
    """Raise CheckpointError for codes without their scales: 8-bit weights that no format has taken."""
    for name, weight in table.items():
        if isinstance(weight, Stored) and name.endswith(".weight") and weight.dtype.itemsize == 1:
            raise CheckpointError(
                f"tensor {name} is {str(weight.dtype).removeprefix('torch.')} and has no scales",
                where=str(weight.file),
                hint="its tensor of scales is missing",
            )
