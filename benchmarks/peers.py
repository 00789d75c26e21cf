"""What other engines took on the same card, from peers.json, beside our rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PEERS = Path(__file__).resolve().parent / "peers.json"
COLUMNS = {"peer_ttft_ms": "peers' TTFT ms", "peer_ms": "peers' ms/step"}


def add_peers(rows: list[Row], path: Path = PEERS) -> None:
    """Fill ``peer_ms`` and ``peer_ttft_ms`` of each row: ``name figure`` of every peer measured there, or None."""
    document = json.loads(path.read_text("utf-8"))
    for row in rows:
        formats = row["recipe"].partition(", fast accumulation")[0]
        same = [p for p in document["peers"] if (p["model"], p["recipe"]) == (row["model"], formats)]
        same = same if row["machine"] == document["machine"] else []
        row["peer_ms"] = figures(same, "ms", f"{row['batch']}x{row['prompt_len']}")
        row["peer_ttft_ms"] = figures(same, "ttft_ms", str(row["prompt_len"])) if row["batch"] == 1 else None


def figures(peers: list[Row], kind: str, key: str) -> str | None:
    """What each peer took, in one cell."""
    return ", ".join(f"{p['name']} {p[kind][key]}" for p in peers if key in p[kind]) or None
