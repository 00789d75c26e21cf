"""Log lines: one JSON object each, on standard error."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any


class Log:
    """Writes events. ``enabled`` False writes nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, event: str, **fields: Any) -> None:
        """One line: the time (UTC), the event, and what there is to say about it."""
        if self.enabled:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False, default=str)
            print(line, file=sys.stderr, flush=True)
