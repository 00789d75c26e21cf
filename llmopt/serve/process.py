"""How a process treats the interpreter and the allocator, so that nothing holds its event loop up."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys

SWITCH_SECONDS = 0.0005
"""How long a thread that reads bodies may keep the interpreter from the event loop, which lets go of it with every
write to a socket: 5 ms each time, Python's own choice, add up."""
OTHER_FILES = 256
"""Files that a server opens besides its connections, and connections that are being refused."""


def favour_the_loop() -> None:
    """Let the event loop's thread have the interpreter soon after it asks."""
    sys.setswitchinterval(SWITCH_SECONDS)


def allow_files(connections: int) -> None:
    """Let the process open so many connections, and a few files, or as many as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def keep_what_is_loaded() -> None:
    """No garbage collection looks again at what exists now: a full one took 87 ms in the API process."""
    gc.collect()
    gc.freeze()


def return_memory() -> None:
    """Return the free pages of every arena to the system, where the C library can (glibc): it keeps them otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
