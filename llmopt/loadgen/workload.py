"""What is sent: prompts and output lengths, drawn from distributions or read from a file, prefixes shared or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.errors import ConfigError, RequestError
from llmopt.loadgen.lengths import Lengths

FIRST_TOKEN = 3
"""Lowest token id drawn: vocabularies begin with special tokens."""
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


@dataclass(frozen=True)
class Call:
    """One request: the fields of its body that are its own, and when it is due (seconds from the start)."""

    due: float
    body: dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """What drawn requests look like. ``prefixes`` distinct beginnings of ``prefix_len`` tokens are shared by turns.

    ``vocab_size``: token ids are drawn below it; used for completions, whose prompts are token ids. Chats are made
    of short words, about a token each. Raises ConfigError for what cannot be drawn.
    """

    prompt_len: Lengths
    output_len: Lengths
    prefixes: int = 0
    prefix_len: int = 0
    vocab_size: int = 1000
    chat: bool = False

    def __post_init__(self) -> None:
        if (self.prefixes > 0) != (self.prefix_len > 0):
            raise ConfigError("--shared-prefixes and --prefix-len go together")
        if self.vocab_size <= FIRST_TOKEN:
            raise ConfigError(f"--vocab-size must be above {FIRST_TOKEN}")

    def bodies(self, rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
        """``count`` requests: the prompt (prefix included) and ``max_tokens``."""
        prefixes = [_tokens(rng, self, self.prefix_len) for _ in range(self.prefixes)]
        prompts, outputs = self.prompt_len.draw(rng, count), self.output_len.draw(rng, count)
        bodies = []
        for index in range(count):
            prefix = prefixes[index % len(prefixes)] if prefixes else []
            content = [*prefix, *_tokens(rng, self, int(prompts[index]))]
            bodies.append({**_prompt(content, self.chat), "max_tokens": int(outputs[index])})
        return bodies


def _tokens(rng: np.random.Generator, shape: Shape, count: int) -> list[Any]:
    if not shape.chat:
        return [int(i) for i in rng.integers(FIRST_TOKEN, shape.vocab_size, count)]
    return ["".join(word) for word in LETTERS[rng.integers(0, len(LETTERS), (count, 3))]]


def _prompt(content: Sequence[Any], chat: bool) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": " ".join(content)}]} if chat else {"prompt": list(content)}


@dataclass(frozen=True)
class FileShape:
    """Requests of a JSONL file, taken in order and over again: lengths, or whole bodies."""

    path: Path
    shape: Shape
    lines: list[dict[str, Any]] = field(repr=False, default_factory=list)

    @staticmethod
    def read(path: Path, shape: Shape) -> FileShape:
        """Read ``{"prompt_len", "output_len"}`` or bodies with ``prompt`` or ``messages``; raises RequestError."""
        try:
            raw = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read: {getattr(error, 'strerror', None) or error}", where=str(path)) from error
        lines = [_line(text, shape.chat, f"{path} line {n}") for n, text in enumerate(raw, 1) if text.strip()]
        if not lines:
            raise RequestError("the file holds no requests", where=str(path))
        return FileShape(path, shape, lines)

    def bodies(self, rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
        """``count`` requests; prompts of lines that hold lengths are drawn."""
        bodies = []
        for index in range(count):
            line = self.lines[index % len(self.lines)]
            if "prompt_len" in line:
                content = _tokens(rng, self.shape, line["prompt_len"])
                line = {**_prompt(content, self.shape.chat), "max_tokens": line["output_len"]}
            bodies.append(line)
        return bodies


def _line(text: str, chat: bool, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RequestError(f"not JSON: {error}", where=where) from error
    wanted = "messages" if chat else "prompt"
    if isinstance(value, dict) and set(value) == {"prompt_len", "output_len"}:
        if all(isinstance(n, int) and n >= 1 for n in value.values()):
            return value
    elif isinstance(value, dict) and wanted in value:
        return value
    raise RequestError(f'expected {{"prompt_len": N, "output_len": N}} or a body with {wanted}', where=where)
