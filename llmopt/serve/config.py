"""Settings of a server, from its command line and from serve.yaml, and what they mean for each of its parts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from llmopt.errors import ConfigError
from llmopt.runtime.fairness import QueueOptions
from llmopt.runtime.options import SchedulerOptions
from llmopt.runtime.swap import SwapOptions
from llmopt.serve.limits import Limits
from llmopt.serve.settings import Settings
from llmopt.target import LoadOptions


def load_options(settings: Settings) -> LoadOptions:
    """For the executor."""
    sequences = 1 if settings.deterministic else settings.max_sequences
    return LoadOptions(settings.device, settings.threads, sequences, settings.max_context, settings.kv_bytes)


def scheduler_options(settings: Settings) -> SchedulerOptions:
    """For the engine."""
    return SchedulerOptions(
        chunk=settings.chunk,
        step_tokens=settings.step_tokens,
        prefix_cache=settings.prefix_cache and not settings.deterministic,
        queue=QueueOptions(settings.max_waiting, settings.max_waiting_per_key, settings.aging),
        swap=SwapOptions(settings.swap_bytes),
    )


def request_limits(settings: Settings) -> Limits:
    """For requests."""
    return Limits(
        settings.max_body,
        settings.max_choices,
        settings.max_output_tokens,
        settings.request_timeout,
        settings.receive_timeout,
        settings.max_connections,
    )


def load_settings(file: Path | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a file, over which go those ``given``. Raises ConfigError naming what is wrong."""
    where, told = (None, {**given}) if file is None else (str(file), {**_read(file), **given})
    try:
        settings = TypeAdapter(Settings).validate_python(told)
    except ValidationError as error:
        raise _translate(error, where) from error
    for setting in fields(settings):
        value, least = getattr(settings, setting.name), setting.metadata["least"]
        if least is not None and value is not None and value < least:
            raise ConfigError(f"{setting.name} must be at least {least}, not {value}", where=where)
    if settings.deterministic and told.get("max_sequences", 1) != 1:
        raise ConfigError("deterministic runs one sequence a step", where=where, hint="leave max_sequences out")
    return settings


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read: {error}", where=str(file)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=str(file)) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("expected settings, each with its name", where=str(file))
    return {str(name): value for name, value in values.items()}


def _translate(error: ValidationError, where: str | None) -> ConfigError:
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        return ConfigError(f"{name}: {first['msg']}", where=where)
    known = [setting.name for setting in fields(Settings)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
    return ConfigError(f"unknown setting {name!r}", where=where, hint=hint)
