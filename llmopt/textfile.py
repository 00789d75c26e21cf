"""Text that users name on the command line."""

from __future__ import annotations

from pathlib import Path

from llmopt.errors import RequestError


def read_utf8(path: Path) -> str:
    """The whole of a UTF-8 file. Raises RequestError when it cannot be read, or for the byte that is not."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8 at byte {error.start}", where=str(path)) from error
    except OSError as error:
        raise RequestError(f"cannot read the text: {error.strerror}", where=str(path)) from error
