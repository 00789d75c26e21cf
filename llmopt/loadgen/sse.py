"""Server-sent events: the payloads of ``data:`` lines, fed in arbitrary pieces."""

from __future__ import annotations


class EventParser:
    """Splits a stream of bytes into payloads. OpenAI's events have one data line each; comments carry none."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads of the lines that ``data`` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
