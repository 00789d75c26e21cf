"""Kernels in CUDA C++, compiled to cubins by NVRTC, which needs neither a GPU nor headers nor a host compiler."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from llmopt.errors import ResourceError

INCLUDED = re.compile(r'^#include "(.*)"$', re.MULTILINE)


def sources(module: str, name: str) -> dict[str, str]:
    """The text of a source beside the module that describes its kernel, and of what it includes, by file name."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).with_name(name).read_text("utf-8")
    included = {header: Path(spec.origin).with_name(header).read_text("utf-8") for header in INCLUDED.findall(text)}
    return {name: text, **included}


@cache
def nvrtc_version() -> str:
    """Major and minor version; raises ResourceError where it is not installed."""
    major, minor = checked(library().nvrtcVersion())
    return f"{major}.{minor}"


def library() -> Any:
    """The bindings; raises ResourceError without them, or without the library behind them."""
    try:
        from cuda.bindings import nvrtc  # type: ignore[import-untyped]

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        hint = "pip install 'llmopt[cuda,cuda-compile]' (Linux; no GPU is needed)"
        raise ResourceError("target cuda compiles CUDA C++ with NVRTC, which is not installed", hint=hint) from error
    return nvrtc


def compile_source(job: Mapping[str, Any]) -> bytes:
    """The cubin of a worker's job. Raises ValueError with the compiler's words."""
    nvrtc = library()
    files = sources(job["module"], job["source"])
    names, (text, *headers) = [name.encode() for name in files], [part.encode() for part in files.values()]
    options = [
        f"--gpu-architecture=sm_{job['arch']}{'a' if job['arch'] >= 90 else ''}",
        "--std=c++17",
        "--device-as-default-execution-space",
    ]
    options += [f"--maxrregcount={job['registers']}"] if job["registers"] else []
    options += [f"-D{name}={value}" for name, value in job["constexprs"]]
    program = checked(nvrtc.nvrtcCreateProgram(text, names[0], len(headers), headers, names[1:]))
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(error):
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise ValueError(log.rstrip(b"\0").decode("utf-8", "replace"))
        cubin = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def checked(answer: tuple[Any, ...]) -> Any:
    """What a call returns beside its status: nothing, a value, or a tuple. Raises ValueError for a failure."""
    error, *values = answer
    if int(error):
        raise ValueError(f"NVRTC failed: {error}")
    return values[0] if len(values) == 1 else tuple(values)
