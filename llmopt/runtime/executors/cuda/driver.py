"""The CUDA driver, typed: every call checked, every failure one of ours (cuda-bindings only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cuda.bindings import driver as cu  # type: ignore[import-untyped]

from llmopt.errors import ConfigError, ExecutorError, ResourceError

_STICKY = {
    cu.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS: "a kernel touched memory that is not its own",
    cu.CUresult.CUDA_ERROR_ILLEGAL_INSTRUCTION: "a kernel ran an illegal instruction",
    cu.CUresult.CUDA_ERROR_MISALIGNED_ADDRESS: "a kernel made a misaligned access",
    cu.CUresult.CUDA_ERROR_LAUNCH_FAILED: "a kernel failed",
    cu.CUresult.CUDA_ERROR_LAUNCH_TIMEOUT: "a kernel ran too long",
    cu.CUresult.CUDA_ERROR_ECC_UNCORRECTABLE: "the GPU's memory has an uncorrectable error",
    cu.CUresult.CUDA_ERROR_HARDWARE_STACK_ERROR: "a kernel's stack is broken",
}
"""Errors after which the context is lost."""


def call(name: str, *args: Any) -> Any:
    """A driver function's result (none, one value, or a tuple).

    Raises ResourceError when memory is short or the driver lacks the function, ExecutorError otherwise.
    """
    try:
        error, *values = getattr(cu, name)(*args)
    except RuntimeError as missing:
        raise no_driver(missing, name) from missing
    if error != cu.CUresult.CUDA_SUCCESS:
        raise failure(name, error)
    return values[0] if len(values) == 1 else tuple(values)


def no_driver(error: RuntimeError, name: str) -> ResourceError:
    """The error for a machine without libcuda, or whose libcuda lacks a function."""
    if "not found" in str(error) and name not in ("cuInit", "cuDriverGetVersion"):
        return ResourceError(f"the NVIDIA driver has no {name}", hint="install a newer driver")
    return ResourceError("no NVIDIA driver on this machine", hint="a cuda artifact needs a GPU and its driver")


def failure(name: str, error: Any) -> ResourceError | ExecutorError:
    """The typed error of a failed call."""
    if error == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        return ResourceError(f"the GPU is out of memory ({name})", hint="another process may hold it: see nvidia-smi")
    if error in _STICKY:
        return ExecutorError(f"{_STICKY[error]} ({error.name}); the engine is dead", hint="restart the process")
    return ExecutorError(f"{name} failed: {error.name}")


@dataclass(frozen=True)
class Device:
    """An opened GPU whose context is current. ``arch``: 90 is compute capability 9.0."""

    index: int
    name: str
    arch: int
    driver: int
    context: Any
    multiprocessors: int

    def free_bytes(self) -> tuple[int, int]:
        """Free and total device memory."""
        free, total = call("cuMemGetInfo")
        return int(free), int(total)

    def close(self) -> None:
        """Give the context back."""
        call("cuDevicePrimaryCtxRelease", call("cuDeviceGet", self.index))


def device_index(text: str) -> int:
    """Index in ``cuda`` or ``cuda:1`` (after CUDA_VISIBLE_DEVICES); raises ConfigError for another device."""
    kind, _, number = text.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        hint = "use --device cuda (or cuda:1)"
        raise ConfigError(f"a cuda artifact does not run on device {text!r}", where="--device", hint=hint)
    return int(number or 0)


def open_device(text: str) -> Device:
    """Make a GPU's primary context current. Raises ResourceError when there is no driver or no such GPU."""
    index = device_index(text)
    try:
        call("cuInit", 0)
    except ExecutorError as error:
        hint = "check CUDA_VISIBLE_DEVICES and nvidia-smi"
        raise ResourceError(f"no usable GPU: {error}", hint=hint) from error
    count = call("cuDeviceGetCount")
    if index >= count:
        hint = "check CUDA_VISIBLE_DEVICES and --device"
        raise ResourceError(f"no GPU {index}: {count} visible", hint=hint)
    handle = call("cuDeviceGet", index)
    attribute = cu.CUdevice_attribute
    major = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle)
    minor = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle)
    count = call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle)
    name = bytes(call("cuDeviceGetName", 128, handle)).split(b"\0")[0].decode()
    context = call("cuDevicePrimaryCtxRetain", handle)
    call("cuCtxSetCurrent", context)
    return Device(index, name, 10 * major + minor, call("cuDriverGetVersion"), context, count)


def pick_arch(device: int, built: tuple[int, ...]) -> int:
    """The architecture whose kernels a GPU runs: its own, or below sm_90 an older one of its generation.

    Raises ResourceError naming both.
    """
    if device in built:
        return device
    older = [a for a in built if a < 90 and a // 10 == device // 10 and a < device]
    if older:
        return max(older)
    held = ", ".join(f"sm_{a}" for a in built) or "none"
    hint = f"recompile with target_options: {{archs: [{device}]}}"
    raise ResourceError(f"this GPU is sm_{device}, the artifact holds kernels for {held}", hint=hint)


def check_multiprocessors(device: Device, needed: int) -> None:
    """Raises ResourceError when a GPU, or the part of it that this process has, is too small for programs that wait for
    each other."""
    if device.multiprocessors < needed:
        what = (
            f"{device.name} has {device.multiprocessors} multiprocessors, the artifact's kernels need {needed} at once"
        )
        raise ResourceError(what, hint="recompile with target_options: {linear_chains: false}")


def check_driver(driver: int, toolkit: int) -> None:
    """``driver``: 13000 is CUDA 13.0; ``toolkit``: major CUDA version of the assembler. Raises ResourceError."""
    if driver // 1000 < toolkit:
        found = f"{driver // 1000}.{driver % 1000 // 10}"
        what = f"the NVIDIA driver supports CUDA {found}, the artifact's kernels need CUDA {toolkit}.0"
        raise ResourceError(what, hint="install a newer driver")
