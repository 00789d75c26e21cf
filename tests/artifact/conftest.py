"""A small handmade artifact, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from llmopt.artifact import BuildInfo, WeightsPlan, write_artifact
from llmopt.artifact.manifest import Golden, Manifest
from llmopt.program import Function, OpCall, Program, Ref, StateGroup, StatePlan, StateSpec, TensorType, WeightType
from llmopt.target import TargetFiles

GOLDEN: list[Golden] = [{"prompt": [1, 2], "tokens": [3, 4], "margins": [0.5, 0.25]}]


@dataclass(frozen=True)
class ArrayReader:
    """A WeightReader over an array."""

    array: npt.NDArray[Any]

    @property
    def type(self) -> TensorType:
        return TensorType(self.array.shape, self.array.dtype.name)

    def chunks(self, max_bytes: int) -> Iterator[npt.NDArray[Any]]:
        if not self.array.shape:
            yield self.array
            return
        rows = max(1, max_bytes // max(1, self.array[:1].nbytes))
        for start in range(0, len(self.array), rows):
            yield self.array[start : start + rows]


def arrays() -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        "a.codes": rng.integers(0, 16, (300, 257), dtype=np.uint8),
        "a.scales": rng.random((300, 1), np.float32),
        "a.odd": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "a.scalar": np.float32(3.5).reshape(()),
        "b.weight": rng.standard_normal((256, 300)).astype(ml_dtypes.bfloat16),
        "b.empty": np.zeros((0, 4), np.float16),
        "b.table": np.arange(20_000, dtype=np.int64),
    }


def program(weights: dict[str, npt.NDArray[Any]]) -> Program:
    types = {name: TensorType(value.shape, value.dtype.name) for name, value in weights.items()}
    call = OpCall("llmopt.linear_q", {"x": Ref("x"), "codes": Ref("a.codes"), "bits": 4}, ("y",))
    hidden = {"x": TensorType(("T", 257), "float32"), "y": TensorType(("T", 300), "float32")}
    return Program(
        functions={"step": Function("step", ("x",), (call,), ("y",), hidden)},
        entry_points={"decode": "step", "extend": "step"},
        weights={name: WeightType(type) for name, type in types.items()},
        states=StatePlan((StateGroup("paged", "paged", 16, (StateSpec("k_0", 2, 8, "float32", 0),)),)),
        dims={"T": (1, 64)},
        max_context=64,
        vocab_size=300,
    )


Write = Callable[..., Manifest]


@pytest.fixture
def write() -> Write:
    def write(destination: Path, **changes: Any) -> Manifest:
        weights = changes.pop("arrays", None) or arrays()
        options: dict[str, Any] = {
            "info": BuildInfo("tiny", "reference", "float32", "0" * 64, (2,), 1, {"llmopt": "0.1.0"}),
            "program": program(weights),
            "files": TargetFiles({"model.bin": b"kernel"}, {n: ArrayReader(a) for n, a in weights.items()}, {"n": 1}),
            "tokenizer_files": {"tokenizer.json": b'{"version": "1.0"}'},
            "recipe_text": "target: reference\n",
            "report": "{}\n",
            "extra_files": {"ir/00-capture.txt": b"graph"},
            "weights": WeightsPlan(),
            "golden": GOLDEN,
        }
        return write_artifact(destination, **{**options, **changes})

    return write
