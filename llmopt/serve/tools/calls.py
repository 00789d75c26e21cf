"""What the parsers share: waiting for a marker, and reading calls one after another."""

from __future__ import annotations

from llmopt.serve.tools.base import ToolDelta, ToolParser
from llmopt.serve.tools.scan import CallScanner


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that ``marker`` starts with, short of the whole marker."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


class CallsParser(ToolParser):
    """Content, then ``opening`` and JSON calls with ``between`` allowed around them.

    With ``closing`` the calls end there and content may follow; without an ``opening`` only an answer whose
    first character is ``{`` is a call. White space before content and around calls is dropped.
    """

    def __init__(self, *, opening: str, closing: str, key: str, between: str) -> None:
        super().__init__()
        self._opening, self._closing, self._key, self._between = opening, closing, key, between
        self._held = self._skipped = ""
        self._inside = self._spoken = False
        self._scanner: CallScanner | None = None
        self._named = False

    def push(self, text: str) -> tuple[str, list[ToolDelta]]:
        """Content and pieces of calls that are certain now."""
        self._held += text
        content, deltas = "", list[ToolDelta]()
        while True:
            before = (len(self._held), self._inside)
            if self._inside:
                content += self._read_calls(deltas)
            else:
                content += self._read_content()
            if (len(self._held), self._inside) == before or not self._held:
                return content, deltas

    def flush(self) -> tuple[str, list[ToolDelta]]:
        """The rest: what was held back, and a call that never showed its name, are content."""
        content = self._give_up() if self._scanner is not None else self._skipped
        content += "" if self.calls and not self._held.strip() else self._held
        self._held = self._skipped = ""
        return content, []

    def _read_content(self) -> str:
        """Content up to the opening, which may be coming in pieces."""
        if not self._spoken and not self._held.strip():
            return ""
        if not self._opening:
            self._inside = not self._spoken and self._held.lstrip().startswith("{")
            return "" if self._inside else self._say(self._held)
        start = self._held.find(self._opening)
        if start >= 0:
            said = self._held[:start].rstrip()
            self._skip(start + len(self._opening), start=len(said))
            self._inside = True
            return self._speak(said)
        certain = self._held[: len(self._held) - overlap(self._held, self._opening)]
        return self._say(certain.rstrip())

    def _say(self, text: str) -> str:
        self._held = self._held[len(text) :]
        return self._speak(text)

    def _skip(self, end: int, start: int = 0) -> None:
        """Set held text aside, to be given back when no call follows."""
        self._skipped += self._held[start:end]
        self._held = self._held[end:]

    def _speak(self, text: str) -> str:
        self._spoken = self._spoken or bool(text.strip())
        return text

    def _read_calls(self, deltas: list[ToolDelta]) -> str:
        """Calls; returns content when something turns out to be none."""
        if self._scanner is None:
            self._skip(len(self._held) - len(self._held.lstrip(self._between)))
            if self._closing and self._held.startswith(self._closing):
                self._held, self._inside = self._held[len(self._closing) :].lstrip(), False
                skipped = self._take_back()
                return "" if self.calls else skipped
            if not self._held or (self._closing and overlap(self._held, self._closing) == len(self._held)):
                return ""
            self._scanner, self._named = CallScanner(self._key), False
        self._held = self._scanner.push(self._held)
        self._report(deltas)
        if self._scanner.broken or (self._scanner.done and not self._named):
            return self._give_up()
        if self._scanner.done:
            self._scanner = None
        return ""

    def _report(self, deltas: list[ToolDelta]) -> None:
        assert self._scanner is not None
        if not self._named and self._scanner.seen:
            self._named, self._skipped = True, ""
            self.calls += 1
            deltas.append(ToolDelta(self.calls - 1, self._scanner.name))
        if self._named and (arguments := self._scanner.take()):
            deltas.append(ToolDelta(self.calls - 1, arguments=arguments))

    def _give_up(self) -> str:
        """The scanner's text is no call: it is content, with its opening, unless a call of it is known already."""
        assert self._scanner is not None
        raw, named = self._scanner.raw, self._named
        self._scanner, self._inside, self._spoken = None, False, True
        if named:
            _, found, rest = self._held.partition(self._closing) if self._closing else ("", "", self._held)
            self._held = rest if found else self._held
            return ""
        return self._take_back() + raw

    def _take_back(self) -> str:
        """What was set aside for a call that did not come."""
        skipped, self._skipped = self._skipped, ""
        return skipped
