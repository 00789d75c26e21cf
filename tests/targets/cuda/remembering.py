"""Triton's interpreter, remembering what it works out again at every launch, call and operation.

Half of its time went into finding the builtins to patch and into describing shapes; what kernels compute is untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

core: Any = tl.core
plain_patch: Callable[[Any], Any] = interpreter._patch_lang
plain_dtype: Callable[[Any], Any] = interpreter._get_np_dtype
plain_block: Callable[..., None] = core.block_type.__init__


@cache
def patch_lang(function: Any) -> Any:
    """Patches the language for a function once, and for good: nothing in this process compiles."""
    plain_patch(function)
    return interpreter._LangPatchScope()


@cache
def dtype_of_scalar(type_: Any) -> Any:
    """numpy's type for elements of a type."""
    return plain_dtype(type_)


def np_dtype(type_: Any) -> Any:
    """numpy's type for a type or for blocks of it. Types of pointers cannot be keys."""
    scalar = type_.scalar
    return plain_dtype(scalar) if isinstance(scalar, tl.pointer_type) else dtype_of_scalar(scalar)


BLOCKS: dict[Any, dict[str, Any]] = {}


def block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """A block type's attributes: made once for each element type and shape."""
    values = shape.values if isinstance(shape, core.tuple) else shape
    key = (type(element_ty), element_ty.name, *(s.value if isinstance(s, core.constexpr) else s for s in values))
    if key not in BLOCKS:
        plain_block(self, element_ty, shape)
        BLOCKS[key] = dict(vars(self))
    vars(self).update(BLOCKS[key])


@cache
def sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A tensor's number of elements and its shape, as the language's constants."""
    count = 1
    for size in shape:
        count *= size
    return core.constexpr(count), core.tuple([core.constexpr(size) for size in shape])


def tensor(self: Any, handle: Any, type_: Any) -> None:
    """A tensor's attributes, its shape shared with other tensors'."""
    self.handle, self.type, self.dtype = handle, type_, type_.scalar
    self.numel, self.shape = sizes(tuple(type_.shape) if type_.is_block() else ())


def install() -> None:
    """Make the interpreter remember."""
    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = np_dtype
    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
