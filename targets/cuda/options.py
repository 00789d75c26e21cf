"""The cuda target's options, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmopt.errors import ConfigError
from llmopt.program import Program

ARCHS = (80, 89, 90, 100)
NEVER, PREFILL, ALWAYS = "never", "prefill", "always"


@dataclass(frozen=True)
class CudaOptions:
    """What a recipe's ``target_options`` may say.

    ``archs``: compute capabilities to build for, 90 is sm_90. ``decode_buckets``: batch sizes with a CUDA graph
    each. ``extend_buckets``: rows of a prefill or mixed step. ``extend_sequences``: sequences of one; where a recipe
    does not say, those of the default that fit the largest of ``extend_buckets``. ``jobs``: compile processes (0: one
    a core). ``tuning``: a table by ``llmopt tune`` instead of the built-in one. ``fp8_fast_accumulation``: in which
    steps the tensor cores of sm_90 may sum all of K of FP8 products, in fewer bits than fp32: ``never``, ``prefill``
    (prefill and mixed steps, decodes in them too) or ``always``. ``linear_chains``: linears of one row may run in one
    launch, whose programs need a multiprocessor each (chain.py); false for parts of a GPU.
    """

    archs: tuple[int, ...] = (90,)
    decode_buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    extend_buckets: tuple[int, ...] = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
    extend_sequences: tuple[int, ...] = (1, 16, 256)
    jobs: int = 0
    tuning: Path | None = None
    fp8_fast_accumulation: str = NEVER
    linear_chains: bool = True

    def accumulates_fast(self, function: str) -> bool:
        """Whether linears over FP8 codes may, in the steps of a function: ``decode`` or ``extend``."""
        return self.fp8_fast_accumulation in {"decode": (ALWAYS,), "extend": (PREFILL, ALWAYS)}[function]


def parse_options(raw: Mapping[str, Any]) -> CudaOptions:
    """The validated options; raises ConfigError naming the key."""
    known = [f.name for f in fields(CudaOptions)]
    for key in raw:
        if key not in known:
            close = get_close_matches(key, known)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown option {key!r} of target cuda", where="target_options", hint=hint)
    others = ("jobs", "tuning", "fp8_fast_accumulation", "linear_chains")
    values: dict[str, Any] = {key: counts(key, value) for key, value in raw.items() if key not in others}
    if "fp8_fast_accumulation" in raw:
        values["fp8_fast_accumulation"] = word("fp8_fast_accumulation", raw["fp8_fast_accumulation"])
    if "linear_chains" in raw:
        values["linear_chains"] = switch("linear_chains", raw["linear_chains"])
    if "jobs" in raw:
        values["jobs"] = natural("jobs", raw["jobs"], 0)
    if "tuning" in raw:
        values["tuning"] = Path(text("tuning", raw["tuning"]))
    if unknown := [a for a in values.get("archs", ()) if a not in ARCHS]:
        hint = f"one of {', '.join(map(str, ARCHS))}"
        raise ConfigError(f"arch {unknown[0]} is not supported", where="target_options.archs", hint=hint)
    options = CudaOptions(**values)
    return fitting(options) if "extend_sequences" not in raw else checked(options)


def fitting(options: CudaOptions) -> CudaOptions:
    """The options without counts of sequences that no extend bucket has a row each for; refused if none is left."""
    counts = tuple(n for n in options.extend_sequences if n <= options.extend_buckets[-1])
    return replace(options, extend_sequences=counts) if counts else checked(options)


def checked(options: CudaOptions) -> CudaOptions:
    """The options, unless a count of sequences fits no extend bucket: it would lower how many are served at once."""
    most, rows = options.extend_sequences[-1], options.extend_buckets[-1]
    if most > rows:
        what = f"{most} sequences do not fit a step of {rows} rows, the largest of extend_buckets"
        hint = f"add an entry of at least {most} to extend_buckets, or lower this one"
        raise ConfigError(what, where="target_options.extend_sequences", hint=hint)
    return options


def counts(key: str, value: Any) -> tuple[int, ...]:
    """A list of different positive integers, ascending."""
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"expected a list of integers, found {value!r}", where=f"target_options.{key}")
    return tuple(sorted({natural(key, item, 1) for item in value}))


def text(key: str, value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"expected a file name, found {value!r}", where=f"target_options.{key}")
    return value


def word(key: str, value: Any, known: tuple[str, ...] = (NEVER, PREFILL, ALWAYS)) -> str:
    """One of the words that are known."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"expected one of {', '.join(known)}, found {value!r}", where=f"target_options.{key}")
    return value


def switch(key: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"expected true or false, found {value!r}", where=f"target_options.{key}")
    return value


def natural(key: str, value: Any, least: int) -> int:
    """An integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"expected an integer of at least {least}, found {value!r}", where=f"target_options.{key}")
    return value


def clamp(options: CudaOptions, program: Program) -> CudaOptions:
    """Buckets the program can fill: no more rows than it allows (the first bucket that covers them is kept), and no
    more sequences than rows."""
    _, rows = program.dims["T"]
    extend = [r for i, r in enumerate(options.extend_buckets) if i == 0 or options.extend_buckets[i - 1] < rows]
    return fitting(replace(options, extend_buckets=tuple(extend)))
