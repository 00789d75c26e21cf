"""What one request may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmopt.runtime.params import GenerationParams
from llmopt.serve.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """Bounds on a request.

    ``body_bytes``: of its body. ``choices``: prompts times n. ``output_tokens``: new tokens of a choice; a request that
    names no number gets as many at most, one that names a larger number is refused (None: the context is the bound).
    ``seconds``: from its arrival to its last token (None: no bound). ``receive_seconds``: in which its head must
    arrive, and then its body. ``connections``: that may be open.
    """

    body_bytes: int = 16 << 20
    choices: int = 128
    output_tokens: int | None = None
    seconds: float | None = None
    receive_seconds: float = 60.0
    connections: int = 4096

    def check_choices(self, choices: int) -> None:
        """Raises ApiError when a request asks for more choices than allowed."""
        if choices > self.choices:
            raise ApiError(f"the request asks for {choices} choices, this server allows {self.choices}", param="n")

    def bounded(self, params: GenerationParams) -> GenerationParams:
        """The same parameters within the bounds. Raises ApiError when more tokens are asked for than allowed."""
        limit, wanted = self.output_tokens, params.max_tokens
        if limit is not None and wanted is not None and wanted > limit:
            raise ApiError(f"max_tokens is {wanted}, this server allows {limit}", param="max_tokens")
        return replace(params, max_tokens=limit if wanted is None else wanted, timeout=self.seconds)
