"""How a process treats the interpreter and the allocator, so that nothing holds its event loop up."""

from __future__ import annotations

import ctypes
import gc
import sys

SWITCH_SECONDS = 0.0005
"""How long a thread that reads bodies may keep the interpreter from the event loop, which lets go of it with every
write to a socket: 5 ms each time, Python's own choice, add up."""


def favour_the_loop() -> None:
    """Let the event loop's thread have the interpreter soon after it asks."""
    sys.setswitchinterval(SWITCH_SECONDS)


def keep_what_is_loaded() -> None:
    """No garbage collection looks again at what exists now: a full one took 87 ms in the API process."""
    gc.collect()
    gc.freeze()


def return_memory() -> None:
    """Return the free pages of every arena to the system, where the C library can (glibc): it keeps them otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
