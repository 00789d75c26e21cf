"""What Gluon calls differently in Triton 3.6 and later."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Waits for the other warps of the same partition."""
copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
"""From a descriptor's box to shared memory."""
