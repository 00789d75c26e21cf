"""From a Hugging Face checkpoint to a Module: checkpoint reading and graph capture."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmopt.frontend.checkpoint import Checkpoint, load_checkpoint
    from llmopt.frontend.ledger import Ledger
    from llmopt.frontend.tracing import Captured, capture

__all__ = ["Captured", "Checkpoint", "Ledger", "capture", "load_checkpoint"]

_HOMES = {
    "Captured": "llmopt.frontend.tracing",
    "capture": "llmopt.frontend.tracing",
    "Checkpoint": "llmopt.frontend.checkpoint",
    "load_checkpoint": "llmopt.frontend.checkpoint",
    "Ledger": "llmopt.frontend.ledger",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
