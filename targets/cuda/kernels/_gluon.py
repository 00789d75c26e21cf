"""What Gluon calls differently in Triton 3.6 and later."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Waits for the other warps of the same partition."""
