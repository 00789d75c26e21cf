"""Gives memory back to the system: the allocator keeps what was freed, for a process that may want it again."""

from __future__ import annotations

import ctypes


def return_memory() -> None:
    """Return the free pages of every arena, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
