"""Dtype names: ours (torch's), numpy's and safetensors' spelling of each."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from llmopt.errors import ArtifactError

_DTYPES: dict[str, tuple[str, Any]] = {
    "float64": ("F64", np.float64),
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("F8_E4M3", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("F8_E5M2", ml_dtypes.float8_e5m2),
    "int64": ("I64", np.int64),
    "int32": ("I32", np.int32),
    "int16": ("I16", np.int16),
    "int8": ("I8", np.int8),
    "uint64": ("U64", np.uint64),
    "uint32": ("U32", np.uint32),
    "uint16": ("U16", np.uint16),
    "uint8": ("U8", np.uint8),
    "bool": ("BOOL", np.bool_),
}
_BY_SAFETENSORS = {name: ours for ours, (name, _) in _DTYPES.items()}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy dtype of ``float32``, ``bfloat16`` (ml_dtypes), …; raises ArtifactError when unknown."""
    if name not in _DTYPES:
        raise ArtifactError(f"unknown dtype {name!r}", hint=f"known: {', '.join(_DTYPES)}")
    dtype: np.dtype[Any] = np.dtype(_DTYPES[name][1])
    return dtype


def to_safetensors(name: str) -> str:
    """safetensors' spelling; raises ArtifactError when unknown."""
    numpy_dtype(name)
    return _DTYPES[name][0]


def from_safetensors(name: str) -> str:
    """Our spelling of a safetensors dtype; raises ArtifactError when unknown."""
    if name not in _BY_SAFETENSORS:
        raise ArtifactError(f"unknown safetensors dtype {name!r}", hint=f"known: {', '.join(_BY_SAFETENSORS)}")
    return _BY_SAFETENSORS[name]
