"""The settings of ``llmopt serve``, by name: plain data, so that ``--help`` needs no library."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal


def _setting(default: Any, what: str, *, least: float | None = None) -> Any:
    """A field with its description; ``least`` is its smallest value."""
    return field(default=default, metadata={"what": what, "least": least})


@dataclass(frozen=True)
class Settings:
    """Every setting. Sizes are bytes and times are seconds, unless a name says otherwise."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(8000, "Port to listen on; 0: any free one.", least=0)
    served_model_name: str | None = _setting(None, "Name of the model in the API (default: the artifact's).")
    weights: Path | None = _setting(None, "Directory of weights that are kept outside.")  # noqa: RUF009
    device: str = _setting("cpu", "Device of the executor: cpu or cuda.")
    threads: int = _setting(0, "Threads of the executor (0: all cores).", least=0)
    engine_nice: int = _setting(5, "How far the engine stands back on cores it shares (0: not; 19: most).", least=0)
    max_sequences: int = _setting(8, "Sequences a step may hold.", least=1)
    max_context: int | None = _setting(None, "Longest sequence (default: the artifact's).", least=2)
    kv_bytes: int | None = _setting(None, "Memory for KV state (default: what the device has left).", least=1)
    deterministic: bool = _setting(
        False, "A text at temperature 0 does not depend on what else runs: one sequence a step, no prefix cache."
    )
    chunk: int | None = _setting(
        256, "Prompt tokens in a step that others decode in, and what fills its padding.", least=1
    )
    step_tokens: int | None = _setting(None, "Tokens of a step (default: the executor's limit).", least=1)
    prefix_cache: bool = _setting(True, "Keep and share the states of equal prefixes.")
    swap_bytes: int = _setting(0, "Host memory for preempted states; 0: they are computed again.", least=0)
    max_waiting: int | None = _setting(1024, "Requests that may wait; more get 429.", least=1)
    max_waiting_per_key: int | None = _setting(None, "Requests of one API key that may wait.", least=1)
    aging: float = _setting(30.0, "Seconds of waiting that are worth one step of priority.", least=0.001)
    max_body: int = _setting(16 << 20, "Bytes of a request's body; more get 413.", least=1)
    max_choices: int = _setting(128, "Prompts times n of a request.", least=1)
    max_output_tokens: int | None = _setting(None, "New tokens of a choice (default: the context).", least=1)
    request_timeout: float | None = _setting(None, "Seconds from a request's arrival to its last token.", least=0.001)
    receive_timeout: float = _setting(60.0, "Seconds for a request's head to arrive, then for its body.", least=0.001)
    max_connections: int = _setting(4096, "Open connections; more get 503, but for health and metrics.", least=1)
    drain_seconds: int = _setting(30, "How long a shutdown waits for running requests.", least=0)
    stuck_seconds: float = _setting(60.0, "Silence of the engine after which the server gives up.", least=0.001)
    tool_format: str | None = _setting(None, "How the model writes tool calls (default: its chat template's).")
    api_keys_file: Path | None = _setting(None, "API keys, one a line: KEY, or TENANT KEY.")  # noqa: RUF009
    cors_origins: tuple[str, ...] = _setting((), "Pages of other sites that may use the API; repeatable.")
    log: Literal["json", "off"] = _setting("json", "Log of requests and events on standard error.")

    @property
    def public(self) -> bool:
        """Whether other machines can reach the server."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"
