"""The CPU kernels in C: the sources beside this file, compiled into one library by a compiler from a wheel."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from llmopt.errors import TargetError
from llmopt.lower.cache import cache_folder, write_aside

SOURCES = Path(__file__).parent
FLAGS = ("-target", "x86_64-linux-musl", "-mcpu=x86_64", "-O3", "-std=c11", "-Wall", "-Wextra", "-Werror",
         "-shared", "-fPIC", "-nostdlib", "-ffreestanding", "-s")  # fmt: skip
"""Nothing of a C library is used: the file loads under glibc and musl alike. Functions name the AVX2 they need."""


def toolchain() -> str:
    """The compiler and its version; raises TargetError when it is not installed."""
    try:
        return f"zig {version('ziglang')}"
    except PackageNotFoundError as error:
        hint = "pip install ziglang, or native_kernels: false in target_options"
        raise TargetError("the C compiler of the CPU kernels is not installed", hint=hint) from error


def library() -> bytes:
    """The kernels for x86-64 Linux, the same bytes on every machine; compiled once a cache.

    Raises TargetError when the compiler is missing or refuses.
    """
    entry = cache_folder() / "native" / f"{key()}.so"
    try:
        digest, kept = entry.read_bytes().split(b"\n", 1)
        if hashlib.sha256(kept).hexdigest().encode() == digest:
            return kept
    except (OSError, ValueError):
        pass  # never compiled, or damaged: compiled again
    made = build()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        write_aside(entry, hashlib.sha256(made).hexdigest().encode() + b"\n" + made)
    return made


def key() -> str:
    """Digest of everything the library depends on."""
    digest = hashlib.sha256("\0".join((toolchain(), *FLAGS)).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build() -> bytes:
    """Compile the sources; raises TargetError with the compiler's words."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "kernels.so"
        # names relative to the sources: no path of this machine gets into the library
        names = sorted(path.name for path in SOURCES.glob("*.c"))
        command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, *names, "-o", str(output)]
        own = {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}
        result = subprocess.run(command, cwd=SOURCES, env=os.environ | own, capture_output=True, text=True)
        if result.returncode or not output.is_file():
            lines = result.stderr.strip().splitlines()
            first = next((line for line in lines if "error" in line), lines[-1] if lines else "no output")
            raise TargetError(f"the CPU kernels do not compile: {first}", where=str(SOURCES))
        return output.read_bytes()
