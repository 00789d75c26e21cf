"""Streaming detokenization: never half a UTF-8 character, and the pieces add up to the whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Literal, Protocol

from tokenizers import Tokenizer as Backend

Kind = Literal["byte_level", "byte_fallback", "other"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_HELD_TOKENS = 4
"""A UTF-8 character has at most four bytes, so no more tokens than that can be waiting for its end."""


class TextStream(Protocol):
    """Text of one sequence, piece by piece."""

    def push(self, token: int) -> str:
        """Text that is certain now that ``token`` follows; may be empty."""
        ...

    def flush(self) -> str:
        """The rest, at the end of the sequence; an unfinished character becomes U+FFFD."""
        ...


def decoder_kind(backend: Backend) -> Kind:
    """Which of the three ways of decoding a tokenizer.json asks for."""
    steps = _decoder_steps(backend)
    if "ByteLevel" in steps and steps <= {"ByteLevel", "Fuse"}:
        return "byte_level"
    return "byte_fallback" if "ByteFallback" in steps else "other"


def _decoder_steps(backend: Backend) -> set[str]:
    if backend.decoder is None:
        return set()

    def walk(step: dict[str, object]) -> Iterator[str]:
        inner = step.get("decoders")
        if isinstance(inner, list):
            for item in inner:
                yield from walk(item)
        else:
            yield str(step["type"])

    return set(walk(json.loads(backend.decoder.__getstate__())))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: those that print are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


_ALPHABET = byte_alphabet()


class ByteTable:
    """Bytes of single tokens, for tokenizers whose tokens are bytes: computed once a token."""

    def __init__(self, backend: Backend, kind: Kind) -> None:
        self._backend, self._kind = backend, kind
        self._known: dict[int, bytes | None] = {}

    def get(self, token: int) -> bytes | None:
        """Bytes of a token; None when its text is not made of bytes (or depends on its neighbours)."""
        if token not in self._known:
            self._known[token] = self._compute(self._backend.id_to_token(token))
        return self._known[token]

    def _compute(self, text: str | None) -> bytes | None:
        if text is None:
            return b""
        if self._kind == "byte_level":
            if all(c in _ALPHABET for c in text):
                return bytes(_ALPHABET[c] for c in text)
            return text.encode()  # an added token that is plain text
        match = _BYTE_TOKEN.fullmatch(text) if self._kind == "byte_fallback" else None
        return bytes([int(match[1], 16)]) if match else None


class ByteLevelStream:
    """For byte-level tokenizers: concatenated bytes through an incremental UTF-8 decoder."""

    def __init__(self, table: ByteTable, skipped: frozenset[int]) -> None:
        self._table, self._skipped = table, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that is certain now."""
        return "" if token in self._skipped else self._decoder.decode(self._table.get(token) or b"")

    def flush(self) -> str:
        """The rest."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """For every other tokenizer: what a token adds to the text of its predecessor.

    Byte-fallback tokens go through an incremental UTF-8 decoder instead; a run of them that is not valid UTF-8
    gives U+FFFD for its invalid parts only, where ``tokenizers`` would spoil the whole run.
    """

    def __init__(self, backend: Backend, table: ByteTable, skipped: frozenset[int]) -> None:
        self._backend, self._table, self._skipped = backend, table, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Text that is certain now."""
        if token in self._skipped:
            return ""
        raw = self._table.get(token)
        if raw is not None:
            before = self._emit(final=True)
            first, self._window = not self._window, [token] if raw else self._window
            if first and raw.isascii():
                return self._decode([token]) if raw else ""  # decoders strip the space a text begins with
            return before + self._decoder.decode(raw)
        text = self._decoder.decode(b"", final=True)
        self._held.append(token)
        return text + self._emit(final=len(self._held) >= _HELD_TOKENS)

    def flush(self) -> str:
        """The rest."""
        return self._decoder.decode(b"", final=True) + self._emit(final=True)

    def _emit(self, final: bool) -> str:
        """Text of the held tokens, unless its last character may be unfinished."""
        if not self._held:
            return ""
        before = self._decode(self._window)
        after = self._decode(self._window + self._held)
        if after.endswith("\ufffd") and not final:
            return ""
        self._window, self._held = self._held, []
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._backend.decode(tokens, skip_special_tokens=False))
