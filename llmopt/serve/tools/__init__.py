"""Formats in which models write tool calls: one file each, found by its name."""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module

from llmopt.errors import ConfigError
from llmopt.serve.tools.base import ToolDelta, ToolFormat, ToolParser, ToolSpec

_HELPERS = frozenset({"base", "calls", "constrain", "scan"})
DEFAULT = "hermes"
"""What a model without a tool template is asked to write."""


def format_names() -> list[str]:
    """Names of the formats: the modules of this package that are none of its helpers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _HELPERS)


def tool_format(name: str) -> ToolFormat:
    """A format by its name; raises ConfigError with the nearest name."""
    if name not in format_names():
        near = difflib.get_close_matches(name, format_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(format_names())}"
        raise ConfigError(f"unknown tool format {name!r}", hint=hint)
    found = import_module(f"{__name__}.{name}").FORMAT
    assert isinstance(found, ToolFormat)
    return found


def detect_format(template: str | None) -> ToolFormat:
    """The format a chat template teaches its model; the default one when it teaches none."""
    if template is not None:
        for name in format_names():
            if (found := tool_format(name)).taught_by(template):
                return found
    return tool_format(DEFAULT)


__all__ = [
    "DEFAULT",
    "ToolDelta",
    "ToolFormat",
    "ToolParser",
    "ToolSpec",
    "detect_format",
    "format_names",
    "tool_format",
]
