"""Kernels imported by these tests run in Triton's interpreter: the decorators look at the environment."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from targets.cuda.cache import CubinCache
from tests.targets.cuda.remembering import install

plain_convert = interpreter._convert_float


def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
    """The interpreter truncates on the way to bfloat16 where the device rounds to nearest, ties to even; the way back
    is exact, where the interpreter loses subnormals, slowly."""
    if source == tl.bfloat16 and target == tl.float32:
        return data.astype(np.uint32) << np.uint32(16)
    if source != tl.float32 or target != tl.bfloat16:
        return plain_convert(data, source, target, mode)
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(data), np.uint32(0x7FFF), rounded).astype(np.uint16).reshape(data.shape)


interpreter._convert_float = convert

plain_dot = InterpreterBuilder.create_dot


def widened(handle: Any) -> Any:
    """bfloat16, which the interpreter keeps as bit patterns, as float32."""
    bits = handle.data.astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 operands as integers."""
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        a, b = widened(a), widened(b)
    return plain_dot(self, a, b, d, *options)


InterpreterBuilder.create_dot = dot

install()


@pytest.fixture(scope="session")
def cubins() -> CubinCache:
    """The cache that builds use: what the same compiler made of the same sources before is not compiled again.

    That it would be the same, test_cuda_reproducible shows with an empty one.
    """
    return CubinCache()
