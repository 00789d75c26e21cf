"""Kernel selection: every discovered kernel is asked, the cheapest that serves a call wins."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from llmopt.errors import TargetError

from .kernel import CallSite, Kernel, KernelLaunch, Selection, Strided, TmaOperand


@dataclass(frozen=True)
class Choice:
    """The kernel that serves a call, its launches, and why the others do not."""

    kernel: str
    selection: Selection
    refused: tuple[str, ...] = ()


@cache
def discover() -> tuple[Kernel, ...]:
    """The KERNEL (or KERNELS) of every module in kernels/, ordered by module name."""
    package = importlib.import_module(f"{__package__}.kernels")
    found: list[Kernel] = []
    for module_info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        found += [module.KERNEL] if hasattr(module, "KERNEL") else getattr(module, "KERNELS", ())
    return tuple(found)


def choose(site: CallSite, kernels: Iterable[Kernel]) -> Choice:
    """The cheapest kernel for a call. Raises TargetError with every refusal when there is none."""
    served: list[Choice] = []
    refused: list[str] = []
    for kernel in kernels:
        if site.call.op not in kernel.ops:
            continue
        answer = kernel.select(site)
        if isinstance(answer, str):
            refused.append(f"{kernel.name}: {answer}")
        else:
            served.append(Choice(kernel.name, answer))
    if not served:
        raise unserved(site, refused)
    best = min(served, key=lambda choice: (choice.selection.cost_us, choice.kernel))
    slower = [f"{c.kernel}: {c.selection.cost_us:g} us" for c in served if c is not best]
    return replace(best, refused=(*refused, *slower))


def unserved(site: CallSite, refused: list[str]) -> TargetError:
    """The error that names the call, its operands, and each kernel's reason."""
    operands = ", ".join(f"{name} {v.dtype}{list(v.shape)}" for name, v in strided(site.values).items())
    extents = ", ".join(f"{name}={value}" for name, value in sorted(site.dims.items()))
    reasons = "; ".join(refused) or "no kernel knows the op"
    return TargetError(
        f"no kernel serves {site.call.op} ({operands}) on sm_{site.arch}: {reasons}",
        where=f"function {site.function} at {extents}, {site.call.scope or site.call.outputs[0]}",
    )


def strided(values: Mapping[str, Any]) -> dict[str, Strided]:
    """The tensors among a call's arguments; items of a list are named ``name[i]``."""
    found: dict[str, Strided] = {}
    for name, value in values.items():
        if isinstance(value, Strided):
            found[name] = value
        elif isinstance(value, tuple):
            found |= strided({f"{name}[{i}]": item for i, item in enumerate(value)})
    return found


@dataclass
class Selector:
    """Chooses kernels, asking once for calls that differ only in where their values lie."""

    kernels: tuple[Kernel, ...]
    memo: dict[Any, tuple[tuple[str, ...], Choice]] = field(default_factory=dict)

    @property
    def ops(self) -> frozenset[str]:
        """Every op that some kernel serves."""
        return frozenset(op for kernel in self.kernels for op in kernel.ops)

    def refusal(self, site: CallSite) -> str:
        """Why no kernel serves a call; empty if one does."""
        answers = [kernel.select(site) for kernel in self.kernels if site.call.op in kernel.ops]
        return "" if any(not isinstance(answer, str) for answer in answers) else "; ".join(map(str, answers))

    def __call__(self, site: CallSite) -> Choice:
        """The choice for a call, in terms of its own buffers."""
        tensors = [*strided(site.values).values(), *site.outputs]
        names = tuple(dict.fromkeys(t.buffer for t in tensors))
        numbers = {name: i for i, name in enumerate(names)}
        anonymous = tuple((numbers[t.buffer], t.dtype, t.shape, t.strides, t.offset) for t in tensors)
        plain = tuple((k, v) for k, v in site.values.items() if not isinstance(v, Strided))
        key = (site.call.op, anonymous, repr(plain_values(plain)), site.function, tuple(sorted(site.dims.items())))
        if key not in self.memo:
            self.memo[key] = (names, choose(site, self.kernels))
        known, choice = self.memo[key]
        if known == names:
            return choice
        launches = tuple(renamed(launch, dict(zip(known, names))) for launch in choice.selection.launches)
        return replace(choice, selection=replace(choice.selection, launches=launches))


def plain_values(value: Any) -> Any:
    """A value with tensors reduced to a mark, for use as a key."""
    if isinstance(value, Strided):
        return "tensor"
    return tuple(plain_values(item) for item in value) if isinstance(value, tuple) else value


def renamed(launch: KernelLaunch, names: Mapping[str, str]) -> KernelLaunch:
    """A launch over other buffers."""

    def rename(arg: Any) -> Any:
        if isinstance(arg, Strided):
            return replace(arg, buffer=names.get(arg.buffer, arg.buffer))
        if isinstance(arg, TmaOperand):
            return replace(arg, value=rename(arg.value))
        return arg

    return replace(launch, args=tuple(rename(arg) for arg in launch.args))
