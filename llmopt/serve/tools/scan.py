"""Reads ``{"name": …, "arguments": …}`` piece by piece: the name once it is whole, the arguments as they come."""

from __future__ import annotations

import json

_OUTSIDE = frozenset('{}[]:," \t\r\n0123456789+-.eEtrufalsn')
"""Characters JSON allows outside strings."""


class CallScanner:
    """One call object. ``key``: the name of its arguments' field.

    ``raw`` is the text read so far. It ends ``done``, or ``broken`` by a character that cannot stand in a JSON object.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self.raw = ""
        self.name: str | None = None
        self.done = self.broken = False
        self._depth = 0
        self._string = self._escaped = False
        self._field: str | None = None
        self._value = ""
        self._ready = ""

    def push(self, text: str) -> str:
        """Read up to the object's end (or the character that breaks it); returns what is left."""
        for i, char in enumerate(text):
            self._step(char)
            if self.broken:
                return text[i:]
            self.raw += char
            if self.done:
                return text[i + 1 :]
        return ""

    def take(self) -> str:
        """Argument text since the last call of this method; empty while the name is unknown."""
        return "" if self.name is None else self.take_value()

    def take_value(self) -> str:
        """The same, whether the name is known or not."""
        ready, self._ready = self._ready, ""
        return ready

    @property
    def closed(self) -> bool:
        """Whether the arguments are an object that has been read to its end."""
        return self._field == self._key and self._depth == 1 and self._value.endswith("}") and not self._string

    @property
    def seen(self) -> bool:
        """Whether the object is a call: it has a name, and its arguments have begun (or it has ended without any)."""
        return self.name is not None and (self.done or self._field == self._key or bool(self._ready))

    def _step(self, char: str) -> None:
        if self._string:
            self._in_string(char)
        elif char not in _OUTSIDE or (self._depth == 0 and char not in "{ \t\r\n"):
            self.broken = True
        else:
            self._outside(char)

    def _in_string(self, char: str) -> None:
        self._put(char)
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._string = False

    def _outside(self, char: str) -> None:
        if char in "{[":
            self._depth += 1
            if self._depth > 1:
                self._put(char)
        elif self._depth == 1 and char == ":" and self._field is None:
            self._field, self._value = _text(self._value), ""
        elif self._depth == 1 and char in ",}":
            self._end_field()
            self.done = char == "}"
        elif self._depth == 1 and char == "]":
            self.broken = True
        else:
            self._depth -= char in "]}"
            self._string = char == '"'
            if self._depth > 1 or not char.isspace():
                self._put(char)

    def _put(self, char: str) -> None:
        """A character of a key or a value; arguments are ready at once, unless they are JSON inside a string."""
        self._value += char
        if self._field == self._key and self._value[0] != '"':
            self._ready += char

    def _end_field(self) -> None:
        if self._field == "name":
            self.name = _text(self._value)
        elif self._field == self._key and self._value.startswith('"'):
            self._ready += _text(self._value)
        self._field, self._value = None, ""


def _text(value: str) -> str:
    """A JSON string's text; anything else as it is."""
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, str) else value
