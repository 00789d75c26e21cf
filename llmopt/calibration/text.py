"""Token windows for calibration and for the proof, from a text or JSONL file, by seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from llmopt.errors import RequestError
from llmopt.textfile import read_utf8

PIECE = 4000
"""Characters drawn at a time: about two windows of 512 tokens of English."""

HELD_OUT = 8
"""One window in so many is kept for the proof,"""

LEAST = 4
"""and never fewer than this: an interval needs several."""


@dataclass(frozen=True)
class Windows:
    """Token ids: ``calibration`` (n, length), and ``held_out`` (m, length + 1), which no pass ever sees.

    A held-out window is fed its first ``length`` ids and scored on its last.
    """

    calibration: Tensor
    held_out: Tensor


def held_out(tokens: int, length: int) -> tuple[int, int]:
    """Windows to calibrate on and to hold out for about ``tokens`` calibration tokens."""
    count = max(1, round(tokens / length))
    return count, max(LEAST, -(-count // HELD_OUT))


def split(ids: Tensor, held: int) -> Windows:
    """The last ``held`` rows of ids (n, length + 1) are held out: their order says nothing."""
    return Windows(ids[:-held, :-1].contiguous(), ids[-held:].contiguous())


def read_windows(path: Path, tokenizer: Tokenizer, tokens: int, length: int, seed: int = 0) -> Windows:
    """About ``tokens`` calibration tokens in windows of ``length``; an eighth as many, and LEAST windows, held out.

    The text is cut into pieces of PIECE characters, drawn in an order that ``seed`` fixes until there are enough
    tokens. Raises RequestError for a file that cannot be read, or a text that is too short.
    """
    text = read_text(path)
    used, held = held_out(tokens, length)
    count = used + held
    starts = list(range(0, len(text), PIECE))
    random.Random(seed).shuffle(starts)
    ids: list[int] = []
    for start in starts:
        ids += tokenizer.encode(text[start : start + PIECE], add_special_tokens=False).ids
        if len(ids) >= count * (length + 1):
            return split(torch.tensor(ids[: count * (length + 1)]).reshape(count, length + 1), held)
    what = f"the text has {len(ids)} tokens, calibration and its held-out part need {count * (length + 1)}"
    raise RequestError(what, where=str(path), hint="give more text, or lower --calibration-tokens")


def read_text(path: Path) -> str:
    """A UTF-8 text, or the ``text`` of each line of a .jsonl file. Raises RequestError naming the byte or line."""
    content = read_utf8(path)
    if path.suffix != ".jsonl":
        return content
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            what = 'a line is a JSON object with a "text"'
            raise RequestError(what, where=f"{path}, line {number}") from error
        if not isinstance(found, str):
            raise RequestError('"text" is not a string', where=f"{path}, line {number}")
        texts.append(found)
    return "\n\n".join(texts)
